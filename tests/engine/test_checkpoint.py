"""checkpoint.py: a checkpoint is whole or refused, runs no code, and a save that fails takes nothing with it."""

import hashlib
import json
import os
import pickle
import resource
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import optim
from base.errors import UserError
from configurator import Config
from engine import checkpoint, parallel, restore
from model import GPT
from tokenizer import CharTokenizer

CPU = torch.device("cpu")
EXTRA = {  # what train.py adds to training.json
    "data_sha256": "",
    "scaler": {},
    "outliers": {"count": 0, "before": {}},
    "val_loss": None,
    "best_step": None,
    "best_val_loss": None,
}
FILES = ["config.json", "model.safetensors", "tokenizer.json", "training.json", "training.safetensors"]


@dataclass
class Trained:
    """A model two steps into its training."""

    cfg: Config
    model: GPT
    optimizer: torch.optim.AdamW
    tokenizer: CharTokenizer

    def save(self, run_dir: Path, step: int, keep: int = 5, states: list | None = None) -> Path:
        states = [checkpoint.rng_states(CPU)] if states is None else states
        return checkpoint.save(run_dir, self.snapshot(step, states), keep)

    def snapshot(self, step: int, states: list) -> checkpoint.Snapshot:
        tensors = checkpoint.state_tensors(self.model, self.optimizer)
        return checkpoint.Snapshot(step, *tensors, states, self.cfg, self.tokenizer, EXTRA | {"loss": 1.5})

    def load(self, folder: Path) -> dict:
        """Weights, optimizer and random state, into the objects that are there."""
        restore.load_weights(folder, self.model)
        return restore.load_training(folder, self.model, self.optimizer, 0, CPU)


def make(tiny, seed: int = 0, steps: int = 2, **changes) -> Trained:
    torch.manual_seed(seed)
    cfg = Config(**vars(tiny(**dict(n_layer=1) | changes)) | dict(tokens_per_step=32, fused_adamw=True))
    model = GPT(cfg)
    optimizer = optim.adamw(cfg, model)
    for _ in range(steps):
        idx = torch.randint(cfg.vocab_size, (2, 9))
        model(idx[:, :-1], idx[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return Trained(cfg, model, optimizer, CharTokenizer([chr(65 + i) for i in range(cfg.vocab_size)]))


@pytest.fixture
def trained(tiny) -> Trained:
    return make(tiny)


@pytest.fixture
def folder(trained, tmp_path) -> Path:
    """One checkpoint, of step 10, in a run's folder."""
    return trained.save(tmp_path / "run", 10)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- round trip -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"tie_weights": False}, {"bias": False, "vocab_multiple": 64}], ids=str)
def test_all_that_training_needs_comes_back_bit_for_bit(tiny, tmp_path, changes):
    """Weights, moments, step counter and random numbers, of another model object than the one saved."""
    before = make(tiny, **changes)
    folder = before.save(tmp_path, 7)
    drawn = torch.rand(5)  # what comes next in the saved run
    after = make(tiny, seed=1, steps=0, **changes)
    assert not same(before.model.state_dict(), after.model.state_dict())
    restore.verify(folder)
    restore.load_weights(folder, after.model)
    training = restore.load_training(folder, after.model, after.optimizer, 0, CPU)
    assert training["step"] == 7
    assert training["loss"] == 1.5
    assert same(before.model.state_dict(), after.model.state_dict())
    assert {id(p) for g in after.optimizer.param_groups for p in g["params"]} == {id(p) for p in after.model.parameters()}
    moments = [checkpoint.state_tensors(t.model, t.optimizer)[1] for t in (before, after)]
    assert same(*moments)
    assert len(moments[0]) == 3 * len(list(before.model.parameters()))
    assert torch.equal(torch.rand(5), drawn)
    assert restore.read_config(folder) == before.cfg
    assert (after.model.lm_head.weight is after.model.transformer.wte.weight) == before.cfg.tie_weights


def test_each_rank_gets_its_own_random_state_back(trained, tmp_path):
    states = [torch.Generator().manual_seed(rank).get_state() for rank in range(3)]
    folder = trained.save(tmp_path, 1, states=states)
    for rank in range(3):
        restore.load_training(folder, trained.model, trained.optimizer, rank, CPU)
        assert torch.equal(torch.get_rng_state(), states[rank])
    torch.manual_seed(99)
    restore.load_training(folder, trained.model, trained.optimizer, 3, CPU)  # more ranks than before
    assert torch.initial_seed() == 99


def test_load_model_gives_the_same_logits_and_tokenizer(trained, folder):
    idx = torch.arange(20)[None]
    for where in (folder, folder.parent):
        model, tokenizer = restore.load_model(str(where))
        assert torch.equal(model(idx), trained.model(idx))
        assert tokenizer.to_json() == trained.tokenizer.to_json()


# ---- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
@pytest.mark.parametrize("kind", ["missing", "empty", "truncated", "a flipped bit", "longer", "a pickle"])
def test_damage_to_any_file_is_refused_by_name(folder, name, kind):
    path = folder / name
    content = bytearray(path.read_bytes())
    half = len(content) // 2
    if kind == "a flipped bit":
        if name == "manifest.json":  # in a digest: elsewhere it may be a number's last digit, or a space
            half = content.index(b"sha256") + 20
        content[half] ^= 1
    changed = {"truncated": content[:half], "longer": content + b" ", "a pickle": pickle.dumps([1]), "empty": b""}
    if kind == "longer" and name == "manifest.json":
        changed["longer"] = content + b"}"
    path.unlink()
    if kind != "missing":
        path.write_bytes(changed.get(kind, content))
    with pytest.raises(UserError) as e:
        restore.verify(folder)
    assert "\n" not in str(e.value)
    assert str(folder) in str(e.value)
    if name != "manifest.json":
        assert name in str(e.value)
    with pytest.raises(UserError):
        restore.load_model(str(folder))


@pytest.mark.parametrize("place", range(0, 100, 7))
def test_a_flipped_bit_anywhere_in_the_weights_is_found(folder, place):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) * place // 100] ^= 1 << place % 8
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        restore.verify(folder)


def edit_manifest(folder: Path, change) -> None:
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def seal(folder: Path) -> None:
    """What a forger would do: make the manifest fit the files."""

    def fit(values):
        values["files"] = {
            p.name: {"bytes": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()}
            for p in folder.iterdir()
            if p.name != "manifest.json"
        }

    edit_manifest(folder, fit)
    restore.verify(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format=3), "checkpoint format 3; this program reads 2"),
        (lambda m: m.pop("format"), "no readable manifest"),
        (lambda m: m.update(files=[]), "no readable manifest"),
        (lambda m: m["files"].pop("model.safetensors"), "does not list model.safetensors"),
        (lambda m: m["files"].update({"../x": {"bytes": 0, "sha256": ""}}), "outside the folder: ../x"),
        (lambda m: m["files"].update({"/etc/passwd": {"bytes": 0, "sha256": ""}}), "outside the folder"),
        (lambda m: m["files"].update({"..": {"bytes": 0, "sha256": ""}}), "is missing|outside"),
        (lambda m: m["files"].update({"a\0b": {"bytes": 0, "sha256": ""}}), "is missing|outside"),
        (lambda m: m["files"]["config.json"].update(bytes=float("inf")), "no readable manifest"),
    ],
)
def test_a_forged_manifest_is_refused(folder, change, message):
    edit_manifest(folder, change)
    with pytest.raises(UserError, match=message):
        restore.verify(folder)


def rewrite(path: Path, change) -> None:
    """Change the tensors of a safetensors file, and the manifest with it."""
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)
    seal(path.parent)


WRONG = {
    "missing": (lambda t, k: t.pop(k), "missing"),
    "shape": (lambda t, k: t.update({k: torch.zeros(3, 3)}), "shape"),
    "integers": (lambda t, k: t.update({k: torch.zeros(t[k].shape, dtype=torch.int64)}), "int64"),
}


@pytest.mark.parametrize("kind", [*WRONG, "extra"])
@pytest.mark.parametrize(
    ("file", "key"),
    [("model.safetensors", "transformer.h.0.mlp.c_fc.weight"), ("training.safetensors", "exp_avg_sq.transformer.ln_f.weight")],
)
def test_a_key_that_does_not_fit_is_named(trained, folder, file, key, kind):
    """In a checkpoint that is consistent in itself: of another model, or forged."""
    key, change, word = (key, *WRONG[kind]) if kind != "extra" else (f"{key}.more", None, "does not belong")
    rewrite(folder / file, lambda t: change(t, key) if change else t.update({key: torch.zeros(1)}))
    with pytest.raises(UserError, match=word) as e:
        trained.load(folder)
    assert key in str(e.value)
    assert file in str(e.value)


def test_a_random_state_that_is_none_is_refused(trained, folder):
    rewrite(folder / "training.safetensors", lambda t: t.update({"random.0": torch.zeros(3, dtype=torch.uint8)}))
    with pytest.raises(UserError, match=r"random\.0"):
        restore.load_training(folder, trained.model, trained.optimizer, 0, CPU)


@pytest.mark.parametrize(
    "content", ['{"batchsize": 3}', '{"n_layer": "1"}', "[]", "{", pickle.dumps({"n_layer": 1}, 0).decode("ascii")]
)
def test_a_forged_config_is_refused(folder, content):
    (folder / "config.json").write_text(content)
    seal(folder)
    with pytest.raises(UserError, match=r"config\.json"):
        restore.read_config(folder)


class Bomb:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "training.safetensors"])
@pytest.mark.parametrize("how", [pickle.dumps, "torch"])
def test_a_pickle_in_place_of_any_file_is_never_run(trained, folder, tmp_path, name, how):
    """Even where the manifest was made to fit it."""
    bomb = Bomb(tmp_path / "ran")
    if how == "torch":
        torch.save(bomb, folder / name)
    else:
        (folder / name).write_bytes(how(bomb))
    seal(folder)
    loads = [lambda: trained.load(folder), lambda: restore.load_model(str(folder))]
    for load in loads if name == "model.safetensors" else loads[name != "training.safetensors" :][:1]:
        with pytest.raises(UserError, match=name):
            load()
    assert not (tmp_path / "ran").exists()


def test_loading_never_unpickles(trained, folder, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    restore.load_model(str(folder))
    restore.load_training(folder, trained.model, trained.optimizer, 0, CPU)


def test_the_newest_that_is_whole_is_taken_aloud(trained, folder):
    newer = trained.save(folder.parent, 20)
    assert restore.newest(folder.parent) == newer
    (newer / "model.safetensors").write_bytes(b"")
    said = []
    assert restore.newest(folder.parent, said.append) == folder
    assert len(said) == 1
    assert "model.safetensors" in said[0]
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"none of its 2 checkpoint"):
        restore.newest(folder.parent, said.append)


# ---- saving -----------------------------------------------------------------------------------------------------------


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder with its sha256."""
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("where", ["os.fsync", "os.rename", "pathlib.Path.write_text", "pathlib.Path.mkdir"])
@pytest.mark.parametrize("step", [10, 20])
def test_a_save_that_fails_leaves_what_was_there(trained, folder, monkeypatch, where, step):
    """Disk full at every kind of call; a new step, and the same step again."""
    before = tree(folder.parent)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(where, full)
        with pytest.raises(UserError, match="No space left on device"):
            trained.save(folder.parent, step)
    assert tree(folder.parent) == before
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_a_disk_that_is_really_full_is_a_user_error(trained, folder):
    """The kernel refuses to write more than 10 KB to a file: safetensors' own writer, in Rust, is what meets it."""
    before = tree(folder.parent)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot save a checkpoint"):
            trained.save(folder.parent, 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert tree(folder.parent) == before


def test_a_run_killed_while_saving_leaves_nothing_that_loads_and_is_cleaned_up(trained, folder):
    shutil.copytree(folder, folder.parent / ".writing_step_00000020")
    assert restore.newest(folder.parent) == folder
    trained.save(folder.parent, 20)
    assert sorted(p.name for p in folder.parent.iterdir()) == ["step_00000010", "step_00000020"]


@pytest.fixture
def killed(monkeypatch, request):
    """killed(n): the process dies (as far as the disk can tell) at its n-th rename from now on."""

    class Killed(BaseException):
        pass

    def arrange(number: int) -> type[BaseException]:
        plain, left = os.rename, [number]

        def rename(a, b):
            left[0] -= 1
            if left[0] <= 0:
                raise Killed
            plain(a, b)

        monkeypatch.setattr(os, "rename", rename)
        monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # the dead clean up nothing
        request.addfinalizer(monkeypatch.undo)
        return Killed

    return arrange


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_step_that_is_saved_anew_is_always_there(trained, folder, killed, monkeypatch, number):
    """The old folder is moved aside, the new one into its place: killed before, between, or (3) not at all."""
    with torch.no_grad():
        before = tree(folder)
        trained.model.transformer.ln_f.bias.add_(1.0)
    dies = killed(number)
    if number < 3:
        with pytest.raises(dies):
            trained.save(folder.parent, 10)
    else:
        trained.save(folder.parent, 10)
    monkeypatch.undo()
    checkpoint.clean_up(folder.parent)
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    assert restore.newest(folder.parent) == folder
    assert (tree(folder) == before) == (number < 3)


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
    assert tree(run / "step_00000030") == tree(folder)


@given(
    seed=st.integers(0, 99),
    tensors=st.dictionaries(
        st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
            lambda name: name != "__metadata__"
        ),
        st.tuples(st.lists(st.integers(0, 5), max_size=3), st.sampled_from([torch.float32, torch.int64, torch.uint8])),
        max_size=5,
    ),
    piece=st.sampled_from([1, 7, 2**24]),
    taken=st.sampled_from([1, 3, 2**30]),
)
@settings(max_examples=60)
def test_what_is_written_is_what_safetensors_reads(tmp_path_factory, seed, tensors, piece, taken):
    """Bit for bit, scalars and empty tensors too, in whatever pieces it is written and however few bytes a write takes."""
    random = torch.Generator().manual_seed(seed)

    def drawn(shape: list[int], dtype: torch.dtype) -> torch.Tensor:
        size = dtype.itemsize
        content = torch.randint(256, (*shape, size), generator=random, dtype=torch.uint8)
        t = content.view(dtype).reshape(shape)
        return t.transpose(0, -1) if len(shape) > 1 else t  # not contiguous

    class Slow:
        def __init__(self, path, mode, buffering):
            assert (mode, buffering) == ("wb", 0)
            self.file = open(path, mode, buffering=buffering)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def fileno(self):
            return self.file.fileno()

        def write(self, content):
            return self.file.write(bytes(content[:taken]))

    path = tmp_path_factory.mktemp("file") / "x.safetensors"
    written = {name: drawn(shape, dtype) for name, (shape, dtype) in tensors.items()}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(checkpoint, "PIECE", piece)
        patched.setattr(checkpoint, "open", Slow, raising=False)
        entry = checkpoint.write_safetensors(path, written)
    content = path.read_bytes()
    assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    read = safetensors.torch.load_file(path)
    assert read.keys() == written.keys()
    for name, t in written.items():
        assert read[name].dtype == t.dtype
        assert read[name].shape == t.shape
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
        expected = [
            {n: t.clone() for n, t in part.items()} for part in checkpoint.state_tensors(trained.model, trained.optimizer)
        ]
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
        assert same(safetensors.torch.load_file(folder / "model.safetensors"), expected[0])
        moments = safetensors.torch.load_file(folder / "training.safetensors")
        assert torch.equal(moments.pop("random.0"), states[0])
        assert same(moments, expected[1])


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
    assert not same(first, second)
    assert not same(second, {n: p.detach() for n, p in trained.model.named_parameters()})


def test_a_background_save_that_fails_is_told_when_it_is_asked_for(trained, folder, saver, monkeypatch):
    before = tree(folder.parent)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "write_safetensors", full)
        saver.save(trained.snapshot(20, []), 1, None)
        with pytest.raises(UserError, match=r"No space left on device; earlier ones are untouched"):
            saver.wait()
    assert tree(folder.parent) == before
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


def test_a_file_of_tensors_that_no_manifest_lists_is_refused(trained, folder):
    """All *.safetensors of a folder are read as shares of one state: nobody may add one."""
    safetensors.torch.save_file({"transformer.ln_f.weight": torch.zeros(32)}, folder / "shard-00009-model.safetensors")
    with pytest.raises(UserError, match=r"shard-00009-model\.safetensors is not listed in manifest\.json"):
        restore.load_model(str(folder))


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept(trained, tmp_path, keep):
    for step in (1, 2, 10, 300):
        trained.save(tmp_path, step, keep)
    assert [p.name for p in checkpoint.candidates(tmp_path)] == [f"step_{s:08d}" for s in (300, 10, 2, 1)[:keep]]


def test_what_was_just_saved_is_never_deleted(trained, tmp_path):
    """A run that fell back behind a damaged checkpoint saves a step older than that one."""
    trained.save(tmp_path, 20)
    assert trained.save(tmp_path, 10, keep=1).is_dir()
