"""Every untrusted file that is read, damaged at random: the result is a UserError or success, never another exception.

Bytes are changed, JSON values become other JSON values, names gain ".." and "/", keys go and come; where a digest protects the
file, a forger's manifest fits it again. Tokenizers by themselves are fuzzed in test_tokenizer.py.
"""

import contextlib
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from rig.damage import seal_data
from trained import FILES, seal

import configurator
import data
import train
from base.errors import UserError
from base.files import ROOT
from configurator import Config
from corpus import shards
from engine import pretrained, restore
from forecast import curve
from model import GPT

# The originals of a test are made once; each example changes them and puts them back
some = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

numbers = [10**400, 2**63, 2**31, 10**9, 0, -1, 1e308, float("nan"), float("inf")]
hostile = st.sampled_from(["../x", "/etc/passwd", "..", "a/b", "\0", "", "\ud800", *numbers])
scalar = st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=4) | hostile
json_value = st.recursive(
    scalar, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=4), v, max_size=3), max_leaves=4
)


@st.composite
def changed(draw, value):
    """A JSON value with one place in it changed: replaced, taken out, put in, given another name."""
    if isinstance(value, dict | list) and value and draw(st.integers(0, 4)):
        keys = sorted(value) if isinstance(value, dict) else range(len(value))
        key = draw(st.sampled_from(keys))
        how = draw(st.sampled_from(["deeper", "deeper", "deeper", "out", "in", "name"]))
        value = value.copy()
        if how == "deeper":
            value[key] = draw(changed(value[key]))
        elif how == "out":
            del value[key]
        elif isinstance(value, list):
            value.insert(key, draw(json_value))
        elif how == "in":
            value[draw(st.text(max_size=4) | hostile.filter(lambda v: isinstance(v, str)))] = draw(json_value)
        else:
            value[draw(st.sampled_from(["../" + key, key + ".", "/" + key, key.upper()]))] = value.pop(key)
        return value
    return draw(json_value)


deep = st.sampled_from(
    [b"[" * 100_000, b'{"a":' * 100_000, b"[" * 500 + b"]" * 500, b"9" * 5000, b"", b"\xff\xfe", b"null", b'"\\ud800"']
)


@st.composite
def damaged(draw, content: bytes):
    """Bytes with some of them changed, cut off, or put in; of the first 400 mostly, where headers are."""
    content = bytearray(content)
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, min(400, len(content) - 1)) | st.integers(0, len(content) - 1))
        content[at] = draw(st.integers(0, 255))
    return bytes(content[: draw(st.none() | st.integers(0, len(content)))])


def other(path: Path):
    """What may be in place of a file: damage, nonsense, or the same format with something else in it."""
    content = path.read_bytes()
    if path.suffix == ".json":
        forged = changed(json.loads(content)).map(lambda v: json.dumps(v).encode())
    elif path.suffix == ".safetensors":  # a 64-bit length, a JSON header, tensors
        end = 8 + int.from_bytes(content[:8], "little")
        headers = changed(json.loads(content[8:end])).map(lambda v: json.dumps(v).encode())
        forged = headers.map(lambda h: len(h).to_bytes(8, "little") + h + content[end:])
    else:
        forged = st.nothing()
    return damaged(content) | deep | forged


@contextlib.contextmanager
def forged(path: Path, content: bytes, seal=lambda: None):
    """The file with other content, and a manifest that `seal` makes fit, for a while in which a UserError is right."""
    files = {p: p.read_bytes() for p in path.parent.iterdir() if p.is_file()}
    path.write_bytes(content)
    try:
        seal()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(UserError):
            yield
    finally:
        for p in [p for p in path.parent.iterdir() if p.is_file()]:
            p.unlink()
        for p, was in files.items():
            p.write_bytes(was)


# ---- a run's folder ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tiny_run, finished, tmp_path_factory) -> Config:
    """A finished run, to be resumed and sampled from."""
    out_dir = shutil.copytree(finished, str(tmp_path_factory.mktemp("run") / "out"))
    return Config(**tiny_run, out_dir=out_dir, curve="off", resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
@some
@given(st.data())
def test_a_forged_checkpoint_is_refused_or_works(run, name, draw):
    """Resumed by train.train() as a whole, and loaded for sampling."""
    folder = restore.newest(Path(run.out_dir))
    content, fit = draw.draw(other(folder / name)), (lambda: None) if name == "manifest.json" else (lambda: seal(folder))
    with forged(folder / name, content, fit):
        model, tokenizer = restore.load_model(str(folder))
        tokenizer.decode([0, model.cfg.vocab_size - 1])  # every id of the model has a text
    with forged(folder / name, content, fit):
        train.train(run)


@some
@given(st.sampled_from(sorted(configurator.LARGEST)), st.integers(1, 70), st.booleans())
def test_a_checkpoint_of_any_size_is_refused_at_once(run, name, bits, odd):
    """Before a model of 2**70 layers is built."""
    folder = restore.newest(Path(run.out_dir))
    values = json.loads((folder / "config.json").read_text()) | {name: 2**bits + odd}
    with forged(folder / "config.json", json.dumps(values).encode(), seal=lambda: seal(folder)):
        restore.load_model(str(folder))


# ---- a crash capsule --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def capsule(run, tmp_path_factory) -> Path:
    """What a run leaves that was stopped by an outlier."""
    stops = dict(outlier_z=1e-9, outlier_window=2, on_outlier="stop", max_steps=50, resume=False)
    cfg = replace(run, out_dir=str(tmp_path_factory.mktemp("stopped") / "out"), **stops)
    with contextlib.redirect_stdout(io.StringIO()), pytest.raises(UserError, match="--replay"):
        train.train(cfg)
    return next(Path(cfg.out_dir).glob("crash_*"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FILES, "batch.safetensors"])
@settings(some, max_examples=25)
@given(st.data())
def test_a_forged_crash_capsule_is_refused_or_runs(capsule, name, draw):
    with forged(capsule / name, draw.draw(other(capsule / name)), seal=lambda: seal(capsule)):
        train.main(["--replay", str(capsule), "--device=cpu"])


# ---- a data set -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(prepared, tmp_path_factory) -> Path:
    return Path(shutil.copytree(prepared / "tiny", tmp_path_factory.mktemp("data") / "tiny"))


@pytest.mark.parametrize("name", ["manifest.json", "tokenizer.json", "train_000000.bin"])
@some
@given(st.data())
def test_a_forged_data_set_is_refused_or_read(dataset, name, draw):
    """Every token that training could read is below the vocabulary's size."""
    fit = (lambda: seal_data(dataset)) if name.endswith("bin") else (lambda: None)
    with forged(dataset / name, draw.draw(other(dataset / name)), seal=fit):
        opened = shards.open_dataset(dataset)
        for split in ("train", "val"):
            batches = data.TrainBatches(opened.split(split), 32, 1, "shuffled")
            for step in range(3):
                assert int(batches.batch(step, 0, 4, 1, 0, 1)[0].max()) < opened.tokenizer.vocab_size


# ---- a Hugging Face folder --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hf")
    torch.manual_seed(0)
    pretrained.save_hf_dir(GPT(configurator.GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=20)), folder)
    return folder


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@settings(some, max_examples=150)
@given(st.data())
def test_a_forged_hugging_face_folder_is_refused_or_works(hf, name, draw):
    with forged(hf / name, draw.draw(other(hf / name))):
        model = pretrained.load_hf_dir(hf)
        model(torch.zeros(1, 1, dtype=torch.int64))


# ---- settings and curves ----------------------------------------------------------------------------------------------

setting = st.sampled_from(sorted(Config.__dataclass_fields__))
short = st.text(max_size=8)
typed = st.sampled_from(["1", "-1", "2.5", "1e400", "nan", "True", "auto", "None", "[]", "'", "\0", "9" * 5000, "", "=", "--"])
word = st.builds("--{}={}".format, setting | short, typed | short) | st.builds("--{}".format, setting) | short | typed


@settings(some, max_examples=300)
@given(st.lists(word, max_size=4))
@example(["--"])
@example(["-"])
@example(["--seed", "--seed"])
@example(["config"])
def test_whatever_is_typed_is_understood_or_refused(argv):
    """Except for --help, which prints and exits."""
    with contextlib.redirect_stdout(None), contextlib.suppress(SystemExit, UserError):
        configurator.load(argv, "")


@some
@given(st.data())
def test_a_forged_curve_is_refused_or_works(tmp_path_factory, draw):
    path = shutil.copy(ROOT / "config" / "gpt2_124m.curve.json", tmp_path_factory.mktemp("curve"))
    with forged(Path(path), draw.draw(other(Path(path)))):
        tracker = curve.Tracker(Config(), "", curve.read(Path(path)))
        for step in range(1, 5):
            tracker.step(step, 5.0)
            tracker.validated(step, 5.0)
        tracker.causes()
