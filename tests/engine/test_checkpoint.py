"""engine/checkpoint.py: a save is complete or absent, takes nothing with it if it fails, and does not disturb training."""

import contextlib
import hashlib
import io
import math
import os
import shutil
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import contents, equal
from trained import Trained

from base.errors import UserError
from engine import checkpoint, parallel, restore

# ---- saving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["os.fsync", "os.rename", "pathlib.Path.write_text", "pathlib.Path.mkdir"])
@pytest.mark.parametrize("step", [10, 20])
def test_a_save_that_fails_leaves_what_was_there(trained, folder, monkeypatch, where, step):
    """Disk full at every kind of call; a new step, and the same step again."""

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    before = contents(folder.parent)
    with monkeypatch.context() as patched:
        patched.setattr(where, full)
        with pytest.raises(UserError, match="No space left on device"):
            trained.save(folder.parent, step)
    assert contents(folder.parent) == before
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_step_that_is_saved_anew_is_always_there(trained, folder, monkeypatch, number):
    """The old folder is moved aside, the new one into its place: killed before, between, or (3) not at all."""
    before, plain, left = contents(folder), os.rename, [number]
    with torch.no_grad():
        trained.model.transformer.ln_f.bias.add_(1.0)

    def rename(a, b):
        left[0] -= 1
        if left[0] <= 0:
            raise Killed
        plain(a, b)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", rename)
        patched.setattr(shutil, "rmtree", lambda *_, **__: None)  # the dead clean up nothing
        with pytest.raises(Killed) if number < 3 else contextlib.nullcontext():
            trained.save(folder.parent, 10)
    checkpoint.clean_up(folder.parent)
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    assert restore.newest(folder.parent) == folder
    assert (contents(folder) == before) == (number < 3)


def test_a_checkpoint_is_removed_by_a_rename_first(trained, folder, monkeypatch):
    """Killed in the middle of rotation: what has the name of a checkpoint is complete, and the rest is cleaned up."""

    def half(path, ignore_errors=False):
        if Path(path).exists():
            (Path(path) / "model.safetensors").unlink()
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", half)
        with pytest.raises(Killed):
            trained.save(folder.parent, 20, keep=1)
    for candidate in checkpoint.candidates(folder.parent):
        restore.verify(candidate)
    checkpoint.clean_up(folder.parent)
    assert [p.name for p in folder.parent.iterdir()] == ["step_00000020"]


@given(scores=st.lists(st.integers(0, 9), min_size=1, max_size=12), keep=st.integers(1, 3))
@settings(max_examples=25)
def test_the_best_stays_besides_the_newest(tmp_path_factory, scores, keep):
    """Whatever the order of good and bad validations: after each save, the last `keep` and the best so far."""
    run, best = tmp_path_factory.mktemp("run"), None
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(checkpoint, "write", lambda final, *_, **__: final.mkdir())
        for step, score in enumerate(scores):
            best = step if best is None or score < scores[best] else best
            checkpoint.save(run, checkpoint.Snapshot(step, {}, {}, [], None, None, {}), keep, best)
            expected = {*range(max(0, step - keep + 1), step + 1), best}
            assert {checkpoint.step_of(c) for c in checkpoint.candidates(run)} == expected


def test_what_was_just_saved_is_never_deleted(trained, folder):
    """A run that fell back behind a damaged checkpoint saves a step older than that one."""
    assert trained.save(folder.parent, 5, keep=1).is_dir()


@pytest.mark.parametrize("piece", [1, 7, 2**24])
@pytest.mark.parametrize("taken", [1, 3, 2**30])
def test_what_is_written_is_what_safetensors_reads(tmp_path, monkeypatch, piece, taken):
    """Bit for bit, in whatever pieces it is written and however few bytes a write takes."""

    class Slow(io.FileIO):
        def write(self, content):
            return super().write(bytes(content[:taken]))

    written = {
        "bytes": torch.arange(250, 261).to(torch.uint8),  # what follows is not aligned
        "not contiguous": torch.randn(5, 3, 2).transpose(0, -1),
        "a scalar": torch.tensor(-(2**40) - 1),
        "nothing": torch.zeros(3, 0),
        'žluť 🙂 "\n\0': torch.tensor([[math.nan, -0.0, math.inf]]),
        "": torch.tensor([2**62]),
    }
    monkeypatch.setattr(checkpoint, "PIECE", piece)
    monkeypatch.setattr(checkpoint, "open_unbuffered", lambda path: Slow(path, "wb"))
    for name, tensors in (("full", written), ("empty", {})):
        path = tmp_path / f"{name}.safetensors"
        entry = checkpoint.write_safetensors(path, tensors)
        assert entry == {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        read = safetensors.torch.load_file(path)
        assert {n: (t.dtype, t.shape) for n, t in read.items()} == {n: (t.dtype, t.shape) for n, t in tensors.items()}
        for n, t in tensors.items():
            assert read[n].numpy().tobytes() == t.numpy().tobytes()


# ---- saving while training continues ------------------------------------------------------------------------------------


@pytest.fixture
def saver(tmp_path):
    made = checkpoint.Saver(tmp_path / "run", parallel.World(), sharded=False, background=True)
    yield made
    made.close()


@pytest.fixture
def go(monkeypatch) -> threading.Event:
    """Nothing is written before it is set."""
    event, plain = threading.Event(), checkpoint.write

    def write(*args, **how):
        assert event.wait(20)
        return plain(*args, **how)

    monkeypatch.setattr(checkpoint, "write", write)
    return event


def spoil(trained: Trained) -> None:
    """What training steps do to the state while it is written."""
    with torch.no_grad():
        for t in (t for part in checkpoint.state_tensors(trained.model, trained.optimizer) for t in part.values()):
            t.mul_(0.5).add_(1.0)


def test_what_changes_after_a_save_began_does_not_reach_the_file(trained, tmp_path, saver, go):
    """Twice, since the second save uses the first one's memory again."""
    for step in (10, 20):
        before = checkpoint.state_tensors(trained.model, trained.optimizer)
        expected = [{n: t.clone() for n, t in part.items()} for part in before]
        states = [torch.get_rng_state()]
        saver.save(trained.snapshot(step, states), 5, None)
        assert not saver.done()
        spoil(trained)
        go.set()
        folder, seconds = saver.wait()
        go.clear()
        assert folder == tmp_path / "run" / f"step_{step:08d}"
        assert seconds > 0
        assert saver.wait() is None
        restore.verify(folder)
        assert equal(safetensors.torch.load_file(folder / "model.safetensors"), expected[0])
        assert equal(safetensors.torch.load_file(folder / "training.safetensors"), expected[1] | {"random.0": states[0]})


def test_one_save_waits_for_the_one_before(trained, tmp_path, saver, go):
    """Two at a time would share one copy of the state."""
    saver.save(trained.snapshot(10, []), 5, None)
    threading.Timer(0.2, go.set).start()
    spoil(trained)
    saver.save(trained.snapshot(20, []), 5, None)
    assert (tmp_path / "run" / "step_00000010").is_dir()
    saver.wait()
    first, second = (safetensors.torch.load_file(tmp_path / f"run/step_{s:08d}/model.safetensors") for s in (10, 20))
    assert not equal(first, second)


def test_only_the_first_process_writes_what_all_have(trained, tmp_path):
    saver = checkpoint.Saver(tmp_path / "run", parallel.World(rank=1, size=2), sharded=False, background=True)
    saver.save(trained.snapshot(10, []), 1, None)
    assert saver.wait() is None
    saver.close()
    assert not (tmp_path / "run").exists()
