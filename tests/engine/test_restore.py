"""engine/restore.py: a checkpoint comes back bit for bit or is refused, and reading one never runs code."""

import os
import pickle
import re
import signal
from pathlib import Path

import pytest
import safetensors.torch
import torch
from runs import equal
from trained import CPU, FILES, Bomb, edit_manifest, make, seal

from base.errors import UserError
from configurator import GPTConfig
from engine import checkpoint, restore
from engine.pretrained import save_hf_dir
from engine.run import start_from
from model import GPT
from tokenizer import CharTokenizer

# ---- round trip -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"tie_weights": False}, {"bias": False, "vocab_multiple": 64}], ids=str)
def test_all_that_training_needs_comes_back_bit_for_bit(tiny, tmp_path, changes):
    """Weights, moments, step counter and random numbers, of another model object than the one saved."""
    before, after = make(tiny(n_layer=1, **changes)), make(tiny(n_layer=1, **changes), seed=1, steps=0)
    folder = before.save(tmp_path, 7)
    drawn = torch.rand(5)  # what comes next in the saved run
    restore.verify(folder)
    training = after.load(folder)
    assert torch.equal(torch.rand(5), drawn)
    assert (training["step"], training["loss"]) == (7, 1.5)
    assert equal(before.model.state_dict(), after.model.state_dict())
    assert {id(p) for g in after.optimizer.param_groups for p in g["params"]} == {id(p) for p in after.model.parameters()}
    moments = [checkpoint.state_tensors(t.model, t.optimizer)[1] for t in (before, after)]
    assert equal(*moments)
    assert len(moments[0]) == 3 * len(list(before.model.parameters()))
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
@pytest.mark.parametrize("kind", ["missing", "empty", "truncated", "a flipped bit", "longer"])
def test_damage_to_any_file_is_refused_by_name(folder, name, kind):
    path = folder / name
    content = path.read_bytes()
    at = (
        content.index(b"sha256") + 20 if name == "manifest.json" else len(content) // 2
    )  # a digest: elsewhere it may be a space
    changed = {"empty": b"", "truncated": content[:at], "longer": content + b"}"}
    changed["a flipped bit"] = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
    path.unlink()
    if kind != "missing":
        path.write_bytes(changed[kind])
    with pytest.raises(UserError, match=re.escape(str(folder if name == "manifest.json" else path))) as e:
        restore.load_model(str(folder))
    assert "\n" not in str(e.value)


NOTHING = {"bytes": 0, "sha256": ""}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format=3), "checkpoint format 3; this program reads 2"),
        (lambda m: m.pop("format"), "no readable manifest"),
        (lambda m: m.update(files=[]), "no readable manifest"),
        (lambda m: m["files"].pop("model.safetensors"), "does not list model.safetensors"),
        (lambda m: m["files"].update({"../x": NOTHING}), "outside the folder: ../x"),
        (lambda m: m["files"].update({"/etc/passwd": NOTHING}), "outside the folder"),
        (lambda m: m["files"].update({"..": NOTHING}), "is missing|outside"),
        (lambda m: m["files"].update({"a\0b": NOTHING}), "is missing|outside"),
        (lambda m: m["files"].update({"x" * 300: NOTHING}), "x{80} cannot be read .File name too long.$"),
        (lambda m: m["files"]["config.json"].update(bytes=float("inf")), "no readable manifest"),
    ],
)
def test_a_forged_manifest_is_refused(folder, change, message):
    edit_manifest(folder, change)
    with pytest.raises(UserError, match=message):
        restore.verify(folder)


def rewrite(path: Path, change) -> None:
    """Change the tensors of a safetensors file, and the manifest with it: of another model, or forged."""
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
    change, word = WRONG[kind]
    rewrite(folder / file, lambda t: change(t, key))
    with pytest.raises(UserError, match=f"{file}: {key}.*{word}"):
        trained.load(folder)


def test_a_random_state_that_is_none_is_refused(trained, folder):
    rewrite(folder / "training.safetensors", lambda t: t.update({"random.0": torch.zeros(3, dtype=torch.uint8)}))
    with pytest.raises(UserError, match=r"random\.0"):
        restore.load_training(folder, trained.model, trained.optimizer, 0, CPU)


@pytest.mark.parametrize(
    "plant", [torch.save, lambda bomb, path: path.write_bytes(pickle.dumps(bomb))], ids=["torch", "pickle"]
)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "training.safetensors"])
def test_a_pickle_in_place_of_any_file_is_never_run(trained, folder, tmp_path, name, plant):
    """Even where the manifest was made to fit it."""
    plant(Bomb(tmp_path / "ran"), folder / name)
    seal(folder)
    with pytest.raises(UserError, match=name):
        trained.load(folder) if name.endswith("safetensors") else restore.load_model(str(folder))
    assert not (tmp_path / "ran").exists()


def test_the_newest_that_is_whole_is_taken_with_a_warning(trained, folder):
    newer, said = trained.save(folder.parent, 20), []
    assert restore.newest(folder.parent, said.append) == newer
    (newer / "model.safetensors").write_bytes(b"")
    assert not said
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
    """Only load_named(), which the command line reaches, runs one; init_from may come from anywhere."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    for place in ("config.py", "owner/x.py"):
        Path(place).write_text("raise ValueError('this file was run')\n")
    for name in (
        str(tmp_path / "config.py"),
        "config.py",
        "./config.py",
        "owner/x.py",
        "too long " * 99,
    ):
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


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


READERS = {"config.json": restore.read_config, "tokenizer.json": restore.read_tokenizer, "training.json": restore.read_training}


@pytest.mark.usefixtures("ten_seconds")
@pytest.mark.parametrize("make", [os.mkfifo, endless, Path.mkdir])
@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_what_is_not_a_regular_file_is_refused_without_reading_it(folder, name, make):
    (folder / name).unlink()
    make(folder / name)
    with pytest.raises(UserError, match=name):
        restore.load_model(str(folder))
    with pytest.raises(UserError, match=name):
        READERS.get(name, restore.verify)(folder)


@pytest.mark.usefixtures("ten_seconds")
@pytest.mark.parametrize("make", [os.mkfifo, endless, Path.mkdir])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_nor_is_it_read_in_a_folder_of_hugging_face(tiny, tmp_path, name, make):
    save_hf_dir(GPT(tiny()), tmp_path)
    (tmp_path / name).unlink()
    make(tmp_path / name)
    with pytest.raises(UserError, match=str(tmp_path)):
        restore.load_model(str(tmp_path))


@pytest.mark.parametrize("name", ["read_manifest", "read_config", "read_tokenizer", "load_weights"])
def test_a_checkpoint_that_is_removed_while_it_is_read_is_no_damage(trained, folder, monkeypatch, name):
    """A run that still trains saves step 30 and removes step 20 between two reads of another process."""
    trained.save(folder.parent, 20)
    notes, plain = [], getattr(restore, name)

    def read(where, *args):
        if where.name == "step_00000020" and where.is_dir():
            trained.save(folder.parent, 30, keep=1)
        return plain(where, *args)

    monkeypatch.setattr(restore, name, read)
    model, _ = restore.load_model(str(folder.parent), notes.append)
    assert equal(dict(model.named_parameters()), dict(trained.model.named_parameters()))
    assert not notes
