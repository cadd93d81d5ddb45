"""engine/checkpoint.py: a save is complete or absent, takes nothing with it if it fails, and does not disturb training."""

import contextlib
import hashlib
import io
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
from trained import Trained, make

from base.errors import UserError
from engine import checkpoint, parallel, restore


@pytest.fixture
def trained(tiny) -> Trained:
    return make(tiny(n_layer=1))


@pytest.fixture
def folder(trained, tmp_path) -> Path:
    """One checkpoint, of step 10, in a run's folder."""
    return trained.save(tmp_path / "run", 10)


# ---- saving -----------------------------------------------------------------------------------------------------------


def full(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("where", ["os.fsync", "os.rename", "pathlib.Path.write_text", "pathlib.Path.mkdir"])
@pytest.mark.parametrize("step", [10, 20])
def test_a_save_that_fails_leaves_what_was_there(trained, folder, monkeypatch, where, step):
    """Disk full at every kind of call; a new step, and the same step again."""
    before = contents(folder.parent)
    with monkeypatch.context() as patched:
        patched.setattr(where, full)
        with pytest.raises(UserError, match="No space left on device"):
            trained.save(folder.parent, step)
    assert contents(folder.parent) == before
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


class Killed(BaseException):
    pass


@pytest.fixture
def killed(monkeypatch):
    """killed(n): the process dies (as far as the disk can tell) at its n-th rename from now on."""

    def arrange(number: int) -> None:
        plain, left = os.rename, [number]

        def rename(a, b):
            left[0] -= 1
            if left[0] <= 0:
                raise Killed
            plain(a, b)

        monkeypatch.setattr(os, "rename", rename)
        monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # the dead clean up nothing

    return arrange


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_step_that_is_saved_anew_is_always_there(trained, folder, killed, monkeypatch, number):
    """The old folder is moved aside, the new one into its place: killed before, between, or (3) not at all."""
    before = contents(folder)
    with torch.no_grad():
        trained.model.transformer.ln_f.bias.add_(1.0)
    killed(number)
    with pytest.raises(Killed) if number < 3 else contextlib.nullcontext():
        trained.save(folder.parent, 10)
    monkeypatch.undo()
    checkpoint.clean_up(folder.parent)
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    assert restore.newest(folder.parent) == folder
    assert (contents(folder) == before) == (number < 3)


def test_cleaning_up_touches_nothing_else(folder):
    """What is half written goes; what was moved aside comes back, unless there is a new one."""
    run = folder.parent
    names = (".writing_step_00000020", ".writing_crash_00000003", ".replaced_step_00000010", ".replaced_step_00000030")
    for name in (*names, "step_00000005", "crash_00000001"):
        shutil.copytree(folder, run / name)
    (run / ".replaced_step_00000010" / "old").touch()
    (run / "log.jsonl").write_text("{}\n")
    for _ in range(2):
        checkpoint.clean_up(run)
        there = sorted(p.name for p in run.iterdir())
        assert there == ["crash_00000001", "log.jsonl", "step_00000005", "step_00000010", "step_00000030"]
        assert not (run / "step_00000010" / "old").exists()
    assert contents(run / "step_00000030") == contents(folder)


class Slow(io.FileIO):
    """A file that takes few bytes at a time."""

    taken = 2**30

    def write(self, content):
        return super().write(bytes(content[: self.taken]))


NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12)
SHAPES = st.tuples(st.lists(st.integers(0, 5), max_size=3), st.sampled_from([torch.float32, torch.int64, torch.uint8]))


def drawn(shape: list[int], dtype: torch.dtype, random: torch.Generator) -> torch.Tensor:
    content = torch.randint(256, (*shape, dtype.itemsize), generator=random, dtype=torch.uint8)
    t = content.view(dtype).reshape(shape)
    return t.transpose(0, -1) if len(shape) > 1 else t  # not contiguous


@given(
    seed=st.integers(0, 99),
    tensors=st.dictionaries(NAMES.filter(lambda name: name != "__metadata__"), SHAPES, max_size=5),
    piece=st.sampled_from([1, 7, 2**24]),
    taken=st.sampled_from([1, 3, 2**30]),
)
@settings(max_examples=60)
def test_what_is_written_is_what_safetensors_reads(tmp_path_factory, seed, tensors, piece, taken):
    """Bit for bit, scalars and empty tensors too, in whatever pieces it is written and however few bytes a write takes."""
    random = torch.Generator().manual_seed(seed)
    path = tmp_path_factory.mktemp("file") / "x.safetensors"
    written = {name: drawn(shape, dtype, random) for name, (shape, dtype) in tensors.items()}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Slow, "taken", taken)
        patched.setattr(checkpoint, "PIECE", piece)
        patched.setattr(checkpoint, "open_unbuffered", lambda path: Slow(path, "wb"))
        entry = checkpoint.write_safetensors(path, written)
    content = path.read_bytes()
    assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    read = safetensors.torch.load_file(path)
    assert read.keys() == written.keys()
    for name, t in written.items():
        assert (read[name].dtype, read[name].shape) == (t.dtype, t.shape)
        assert torch.equal(read[name].contiguous().view(-1).view(torch.uint8), t.contiguous().view(-1).view(torch.uint8))


# ---- saving while training goes on --------------------------------------------------------------------------------------


@pytest.fixture
def saver(tmp_path):
    """A Saver of one process; and what it is asked to write waits until `go` is set."""
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
    spoil(trained)
    saver.wait()
    first, second = (safetensors.torch.load_file(tmp_path / f"run/step_{s:08d}/model.safetensors") for s in (10, 20))
    assert not equal(first, second)
    assert not equal(second, {n: p.detach() for n, p in trained.model.named_parameters()})


def test_a_background_save_that_fails_is_told_when_it_is_asked_for(trained, folder, saver, monkeypatch):
    before = contents(folder.parent)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "write_safetensors", full)
        saver.save(trained.snapshot(20, []), 1, None)
        with pytest.raises(UserError, match=r"No space left on device; earlier ones are untouched"):
            saver.wait()
    assert contents(folder.parent) == before
    assert saver.wait() is None  # it is told once
    saver.save(trained.snapshot(30, []), 1, None)
    assert saver.wait()[0].name == "step_00000030"


def test_only_the_first_process_writes_what_all_have(trained, tmp_path):
    saver = checkpoint.Saver(tmp_path / "run", parallel.World(rank=1, size=2), sharded=False, background=True)
    saver.save(trained.snapshot(10, []), 1, None)
    assert saver.wait() is None
    saver.close()
    assert not (tmp_path / "run").exists()


@given(
    scores=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    keep=st.integers(1, 3),
)
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
            assert {int(c.name.removeprefix("step_")) for c in checkpoint.candidates(run)} == expected


def test_what_was_just_saved_is_never_deleted(trained, tmp_path):
    """A run that fell back behind a damaged checkpoint saves a step older than that one."""
    trained.save(tmp_path, 20)
    assert trained.save(tmp_path, 10, keep=1).is_dir()


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
    assert restore.newest(folder.parent).name == "step_00000020"
    checkpoint.clean_up(folder.parent)
    assert [p.name for p in folder.parent.iterdir()] == ["step_00000020"]
