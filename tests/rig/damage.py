"""Changes to the files of a run or a data set, and the two demands that many faults share: that it is refused."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

from trained import seal

from base.files import sha256_of
from corpus import shards
from rig.runs import Box


def rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """A function that changes the content of a file in a folder."""
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def put(at: int, content: bytes) -> Callable[[bytes], bytes]:
    """A function that overwrites some bytes."""
    return lambda b: b[:at] + content + b[at + len(content) :]


def seal_data(folder: Path) -> None:
    """Make a data set's manifest fit its files, as a forger would."""
    path = folder / shards.MANIFEST
    values = json.loads(path.read_text())
    for entry in itertools.chain(*values["splits"].values()):
        if (folder / entry["file"]).is_file():
            entry["sha256"] = sha256_of(folder / entry["file"])
    path.write_text(json.dumps(values))


def sealed(change: Callable[[Path], object]) -> Callable[[Path], None]:
    """The same change of a data set, with a manifest that fits."""
    return lambda folder: (change(folder), seal_data(folder))


def refuses_data(box: Box, change: Callable[[Path], object], *words: str) -> None:
    """A data set after change(its folder) is refused before step 1, in a line with these words."""
    box.refused(box.path(), *words, data_dir=box.data(change))


def damaged(box: Box, change: Callable[[Path], object]) -> Path:
    """A run's only checkpoint after change(its folder), consistent in itself: its manifest is made to fit."""
    folder = box.copy_of(box.whole(), upto=4) / "step_00000004"
    change(folder)
    seal(folder)
    return folder


def refuses_to_resume(box: Box, change: Callable[[Path], object], *words: str) -> None:
    box.refused(damaged(box, change).parent, *words, resume=True)


def refuses_to_sample(box: Box, change: Callable[[Path], object], *words: str) -> None:
    box.fails(box.sample(damaged(box, change)), *words)
