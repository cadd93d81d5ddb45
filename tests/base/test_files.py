"""files.py: writes that are whole or absent, reads that end."""

import os
from pathlib import Path

import pytest

from base.files import read_bytes, read_text, sha256_of, write_atomically


@pytest.mark.parametrize("what", ["os.fsync", "os.replace"])
def test_a_write_replaces_the_whole_file_or_leaves_the_old_one_and_nothing_else(tmp_path, monkeypatch, what):
    def fail(*args):
        raise OSError("disk full")

    path = tmp_path / "new" / "file"
    write_atomically(path, b"a long first content")
    write_atomically(path, b"old")
    monkeypatch.setattr(what, fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert [(p.name, p.read_bytes()) for p in path.parent.iterdir()] == [("file", b"old")]


@pytest.mark.parametrize("read", [read_bytes, read_text, sha256_of])
def test_only_regular_files_are_read(tmp_path, read):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "link").symlink_to(Path(__file__))
    for path in (tmp_path / "fifo", tmp_path / "zero", tmp_path):
        with pytest.raises(OSError, match=r"not a regular file|Is a directory"):
            read(path)
    assert read(tmp_path / "link") == read(Path(__file__))


def test_a_file_has_a_largest_size(tmp_path):
    (tmp_path / "file").write_bytes(bytes(10))
    assert read_bytes(tmp_path / "file", most=10) == bytes(10)
    with pytest.raises(OSError, match="larger than 9 bytes"):
        read_bytes(tmp_path / "file", most=9)
