"""engine/restore.py: a checkpoint comes back bit for bit or is refused, and reading one never runs code."""

import os
import pickle
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from runs import equal
from trained import CPU, FILES, Trained, edit_manifest, make, seal

from base.errors import UserError
from configurator import GPTConfig
from engine import checkpoint, restore
from engine.pretrained import save_hf_dir
from engine.run import start_from
from model import GPT
from tokenizer import CharTokenizer


@pytest.fixture
def trained(tiny) -> Trained:
    return make(tiny(n_layer=1))


@pytest.fixture
def folder(trained, tmp_path) -> Path:
    """One checkpoint, of step 10, in a run's folder."""
    return trained.save(tmp_path / "run", 10)


# ---- round trip -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"tie_weights": False}, {"bias": False, "vocab_multiple": 64}], ids=str)
def test_all_that_training_needs_comes_back_bit_for_bit(tiny, tmp_path, changes):
    """Weights, moments, step counter and random numbers, of another model object than the one saved."""
    before = make(tiny(**dict(n_layer=1) | changes))
    folder = before.save(tmp_path, 7)
    drawn = torch.rand(5)  # what comes next in the saved run
    after = make(tiny(**dict(n_layer=1) | changes), seed=1, steps=0)
    assert not equal(before.model.state_dict(), after.model.state_dict())
    restore.verify(folder)
    restore.load_weights(folder, after.model)
    training = restore.load_training(folder, after.model, after.optimizer, 0, CPU)
    assert training["step"] == 7
    assert training["loss"] == 1.5
    assert equal(before.model.state_dict(), after.model.state_dict())
    assert {id(p) for g in after.optimizer.param_groups for p in g["params"]} == {id(p) for p in after.model.parameters()}
    moments = [checkpoint.state_tensors(t.model, t.optimizer)[1] for t in (before, after)]
    assert equal(*moments)
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
    "extra": (lambda t, k: t.update({f"{k}.more": torch.zeros(1)}), "does not belong"),
}


@pytest.mark.parametrize("kind", [*WRONG])
@pytest.mark.parametrize(
    ("file", "key"),
    [("model.safetensors", "transformer.h.0.mlp.c_fc.weight"), ("training.safetensors", "exp_avg_sq.transformer.ln_f.weight")],
)
def test_a_key_that_does_not_fit_is_named(trained, folder, file, key, kind):
    """In a checkpoint that is consistent in itself: of another model, or forged."""
    change, word = WRONG[kind]
    rewrite(folder / file, lambda t: change(t, key))
    with pytest.raises(UserError, match=word) as e:
        trained.load(folder)
    assert key in str(e.value)
    assert file in str(e.value)


def test_a_random_state_that_is_none_is_refused(trained, folder):
    rewrite(folder / "training.safetensors", lambda t: t.update({"random.0": torch.zeros(3, dtype=torch.uint8)}))
    with pytest.raises(UserError, match=r"random\.0"):
        restore.load_training(folder, trained.model, trained.optimizer, 0, CPU)


@pytest.mark.parametrize("content", ['{"batchsize": 3}', '{"n_layer": "1"}', "[]", "{"])
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
@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_pickle_in_place_of_any_file_is_never_run(trained, folder, tmp_path, name, how):
    """Even where the manifest was made to fit it."""
    bomb = Bomb(tmp_path / "ran")
    if how == "torch":
        torch.save(bomb, folder / name)
    else:
        (folder / name).write_bytes(pickle.dumps(bomb))
    seal(folder)
    loads = {trained.load: "safetensors", lambda path: restore.load_model(str(path)): "model config tokenizer"}
    for load, read in loads.items():
        if any(part in read.split() for part in name.split(".")):
            with pytest.raises(UserError, match=name):
                load(folder)
    assert not (tmp_path / "ran").exists()


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


def test_a_file_of_tensors_that_no_manifest_lists_is_refused(trained, folder):
    """All *.safetensors of a folder are read as shares of one state: nobody may add one."""
    safetensors.torch.save_file({"transformer.ln_f.weight": torch.zeros(32)}, folder / "shard-00009-model.safetensors")
    with pytest.raises(UserError, match=r"shard-00009-model\.safetensors is not listed in manifest\.json"):
        restore.load_model(str(folder))


# ---- untrusted folders ------------------------------------------------------------------------------------------------


def test_a_model_by_name_is_never_a_config_file(tmp_path, monkeypatch):
    """Only load_named(), which the command line reaches, runs one; start_from() takes init_from from wherever it comes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    for place in ("config.py", "owner/x.py"):
        Path(place).write_text("raise ValueError('this file was run')\n")
    for name in (str(tmp_path / "config.py"), "config.py", "./config.py", "owner/x.py"):
        with pytest.raises(UserError, match="is not a run, a checkpoint or a model folder"):
            restore.load_model(name)
        with pytest.raises(UserError, match="is not a run, a checkpoint or a model folder"):
            start_from(GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8)), name)
    with pytest.raises(UserError, match="this file was run"):
        restore.load_named("config.py")


@pytest.mark.parametrize("ids", [64, 66, 5000])
def test_a_tokenizer_of_another_size_than_the_model_is_refused(trained, folder, ids):
    """With more ids the embedding would be read outside its rows, with fewer an id would have no text."""
    assert trained.cfg.vocab_size == 65
    (folder / "tokenizer.json").write_text(CharTokenizer([chr(0x4E00 + i) for i in range(ids)]).to_json())
    seal(folder)
    for name in (folder, folder.parent):
        with pytest.raises(UserError, match=f"tokenizer.json has {ids} ids, the model has a vocabulary of 65"):
            restore.load_model(str(name))


@pytest.fixture
def ten_seconds():
    """Raises TimeoutError in a test that waits for ever."""
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError))
    signal.alarm(10)
    yield
    signal.alarm(0)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.usefixtures("ten_seconds")
@pytest.mark.parametrize("make", [fifo, endless, Path.mkdir])
@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_what_is_not_a_regular_file_is_refused_without_reading_it(folder, name, make):
    (folder / name).unlink()
    make(folder / name)
    with pytest.raises(UserError, match=name):
        restore.load_model(str(folder))
    readers = {
        "config.json": restore.read_config,
        "tokenizer.json": restore.read_tokenizer,
        "training.json": restore.read_training,
    }
    if name in readers:
        with pytest.raises(UserError, match=name):
            readers[name](folder)


@pytest.mark.usefixtures("ten_seconds")
@pytest.mark.parametrize("make", [fifo, endless, Path.mkdir])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model-00001-of-00001.safetensors"])
def test_nor_is_it_read_in_a_folder_of_hugging_face(tiny, tmp_path, name, make):
    save_hf_dir(GPT(tiny()), tmp_path)
    (tmp_path / ("config.json" if name == "config.json" else "model.safetensors")).unlink()
    make(tmp_path / name)
    with pytest.raises(UserError) as e:
        restore.load_model(str(tmp_path))
    assert "\n" not in str(e.value)


def test_a_name_that_is_too_long_is_one_line(folder):
    edit_manifest(folder, lambda m: m["files"].update({"x" * 300: {"bytes": 0, "sha256": ""}}))
    for name in (str(folder), "y" * 300, "gpt2/" + "y" * 300):
        with pytest.raises(UserError) as e:
            restore.load_model(name)
        assert "\n" not in str(e.value)


def test_a_checkpoint_that_is_removed_while_it_is_read_is_no_damage(trained, folder, monkeypatch):
    """A run that still trains saves step 30 and removes step 20 between two reads of another process."""
    trained.save(folder.parent, 20)
    notes, plain = [], {}

    def removing(name: str):
        plain[name] = getattr(restore, name)

        def read(where, *args):
            if where.name == "step_00000020" and where.is_dir():
                trained.save(folder.parent, 30, keep=1)
            return plain[name](where, *args)

        return read

    for name in ("read_manifest", "read_config", "read_tokenizer", "load_weights"):
        with monkeypatch.context() as patched:
            patched.setattr(restore, name, removing(name))
            model, _ = restore.load_model(str(folder.parent), notes.append)
            assert equal(dict(model.named_parameters()), dict(trained.model.named_parameters()))
        shutil.rmtree(folder.parent / "step_00000030", ignore_errors=True)
        trained.save(folder.parent, 20)
    assert not notes


def test_the_runs_of_a_folder_are_listed_with_step_and_loss(trained, tmp_path):
    out, told = tmp_path / "out", []
    trained.save(out / "old", 10)
    for step in (10, 20):
        snapshot = trained.snapshot(step, [checkpoint.rng_states(CPU)])
        checkpoint.save(out / "new", replace(snapshot, extra=snapshot.extra | {"val_loss": step / 8}), 5)
    (out / "nothing").mkdir()
    lines = [f"  {out}/new  step 20, val_loss 2.5000", f"  {out}/old  step 10"]
    alone = r"train one first \(without --resume\)$"
    for place, message, expected in (
        (out, "out is a folder of runs", lines),
        (out / "missing", "no checkpoint: .* one of the runs", lines),
        *((place, alone, []) for place in (out / "nothing", tmp_path / "missing", tmp_path / "not" / "there")),
    ):
        with pytest.raises(UserError, match=message):
            restore.newest(place, told.append)
        assert told == expected
        told.clear()
