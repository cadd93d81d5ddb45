"""pretrained.py: GPT-2 weights through transformers and back, and files that are refused."""

import contextlib
import json
import pickle
import tempfile
import urllib.request
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from trained import assert_same_logits, randomised

from base.errors import UserError
from configurator import GPTConfig
from engine import pretrained
from engine.pretrained import config_from_hf, config_to_hf, load_hf_dir, save_hf_dir, to_hf_state
from model import GPT2_SIZES

transformers = pytest.importorskip("transformers", reason="transformers is the oracle of these tests")

SHAPES = {  # a narrow one takes milliseconds
    "narrow": dict(n_layer=2, n_head=16, n_embd=128, vocab_size=100, n_positions=16),
    "124M": dict(n_layer=12, n_head=12, n_embd=768, vocab_size=50257, n_positions=1024),
}


def theirs(**shape):
    """A transformers GPT-2 with every parameter random."""
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SHAPES["narrow"] | shape)).eval()
    for p in model.parameters():
        p.data.normal_(mean=1.0 if p.dim() == 1 else 0.0, std=0.1 if p.dim() == 1 else 0.05)
    return model


@pytest.mark.parametrize("size", ["narrow", pytest.param("124M", marks=pytest.mark.slow)])
def test_weights_travel_from_transformers_and_back(size):
    """transformers -> folder -> ours: equal logits; ours -> state: the same bits."""
    hf = theirs(**SHAPES[size])
    with tempfile.TemporaryDirectory() as scratch:  # pytest keeps its own folders, and 124M parameters are half a gigabyte
        hf.save_pretrained(scratch)
        model = load_hf_dir(Path(scratch)).eval()
    assert (model.cfg.n_head, model.cfg.block_size) == (SHAPES[size]["n_head"], SHAPES[size]["n_positions"])
    assert_same_logits(model, hf, SHAPES[size]["vocab_size"])
    back, original = to_hf_state(model), hf.state_dict()
    assert original.keys() - back.keys() == {"lm_head.weight"}  # tied: stored once
    assert all(torch.equal(back[name], original[name]) for name in back)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("multiple", [1, 64])
@pytest.mark.parametrize("bias", [True, False])
def test_every_variant_is_exported_as_the_same_function(tmp_path, tiny, tie, multiple, bias):
    """Padding stays behind, absent biases become zeros; transformers reads it, and we ourselves the same bits."""
    model = randomised(tiny(tie_weights=tie, vocab_multiple=multiple, bias=bias))
    save_hf_dir(model, tmp_path)
    hf, report = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report  # nothing missing, left over or of another shape
    assert_same_logits(hf.eval(), model, 65, T=32)
    again = load_hf_dir(tmp_path).eval()
    assert again.cfg == tiny(tie_weights=tie)
    assert tie == (hf.lm_head.weight is hf.transformer.wte.weight) == (again.lm_head.weight is again.transformer.wte.weight)
    before = model.state_dict()
    for name, t in again.state_dict().items():
        assert torch.equal(t, before[name][: len(t)] if name in before else torch.zeros_like(t)), name


def test_sharded_half_precision_and_old_files_are_read(tmp_path):
    """Several files; fp16; and the released files' own form: no "transformer." prefix, masks stored, the head stored too."""
    hf = theirs()
    hf.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    hf.save_pretrained(tmp_path / "old")
    state = {name.removeprefix("transformer."): t.clone() for name, t in hf.state_dict().items()}
    state |= {"h.0.attn.bias": torch.ones(1, 1, 16, 16), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    safetensors.torch.save_file(state, tmp_path / "old" / "model.safetensors")
    for folder in ("sharded", "old"):
        assert_same_logits(load_hf_dir(tmp_path / folder).eval(), hf, 100)
    hf.half().save_pretrained(tmp_path / "half")
    assert_same_logits(load_hf_dir(tmp_path / "half").eval(), hf.float(), 100)


def test_a_stored_head_that_differs_is_used_even_if_the_file_says_tied(tmp_path):
    theirs(tie_word_embeddings=False).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["tie_word_embeddings"] is False
    model = load_hf_dir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(values | {"tie_word_embeddings": True}))
    again = load_hf_dir(tmp_path)
    assert not torch.equal(again.lm_head.weight, again.transformer.wte.weight)
    assert_same_logits(again, model, 100, atol=0)


# ---- refusals


@pytest.fixture
def folder(tmp_path, tiny):
    """A good folder, to be spoilt."""
    save_hf_dir(randomised(tiny(n_layer=1)), tmp_path)
    return tmp_path


def test_pickled_weights_are_never_opened(folder):
    class Bomb:
        def __reduce__(self):
            return open, (str(folder / "exploded"), "w")

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="pickle"):
        load_hf_dir(folder)
    (folder / "pytorch_model.bin").rename(folder / "model.safetensors")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load_hf_dir(folder)
    assert not (folder / "exploded").exists()


POSITIONS, MATRIX = "transformer.wpe.weight", "transformer.h.0.mlp.c_fc.weight"
SPOILT = {  # what is wrong -> (the key, its tensor from the right one, the message)
    "missing": ("transformer.h.0.ln_1.bias", lambda t: None, "is missing"),
    "another layer": ("transformer.h.1.ln_1.weight", lambda t: torch.zeros(3), "does not belong"),
    "another head": ("score.weight", lambda t: torch.zeros(3), "does not belong"),
    "a row less": (POSITIONS, lambda t: t[:-1].clone(), "has shape"),
    "not transposed": (MATRIX, lambda t: t.t().contiguous(), "has shape"),  # nn.Linear's instead of Conv1D's
    "whole numbers": (POSITIONS, lambda t: t.to(torch.int32), "int32"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_key_that_does_not_fit_is_named(folder, what):
    key, change, message = SPOILT[what]
    state = safetensors.torch.load_file(folder / "model.safetensors")
    changed = change(state.pop(key, None))
    safetensors.torch.save_file(state | ({} if changed is None else {key: changed}), folder / "model.safetensors")
    with pytest.raises(UserError, match=f"{key}.* {message}" if message != "int32" else message):
        load_hf_dir(folder)


@pytest.mark.parametrize(
    "values",
    [
        *(dict(activation_function="relu"), dict(model_type="llama"), dict(layer_norm_epsilon=1e-6), dict(n_inner=100)),
        *(dict(scale_attn_by_inverse_layer_idx=True), dict(n_layer="many"), dict(n_head=None), dict(n_head=5)),
    ],
    ids=str,
)
def test_another_architecture_is_refused_by_name(folder, values):
    """The usual inner width, though, may be written out."""
    path = folder / "config.json"
    for changes in (dict(n_inner=4 * 32), values):
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        if changes is not values:
            load_hf_dir(folder)
    with pytest.raises(UserError, match=next(iter(values))):
        load_hf_dir(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[1, 2]", None, b"[" * 100_000], ids=lambda b: repr(b)[:9])
def test_files_that_are_something_else_are_refused_by_name(folder, name, content):
    """None: what it was, truncated."""
    (folder / name).write_bytes((folder / name).read_bytes()[:-1] if content is None else content)
    with pytest.raises(UserError, match=name):
        load_hf_dir(folder)


json_value = (
    st.none() | st.booleans() | st.integers(-3, 40) | st.floats() | st.text(max_size=3) | st.lists(st.integers(), max_size=2)
)
hf_names = [*pretrained.FIXED, "n_layer", "n_head", "n_embd", "vocab_size", "n_positions", "n_ctx", "tie_word_embeddings"]


@given(st.dictionaries(st.sampled_from(hf_names), json_value, max_size=3), st.sets(st.sampled_from(hf_names), max_size=2))
@example({"n_inner": 3}, {"n_embd"})
@example({"n_inner": 3, "n_embd": None}, set())
@example({"n_layer": float("inf")}, set())
@example({"n_layer": float("nan")}, set())
@example({"activation_function": ["gelu_new"]}, set())
def test_any_config_is_read_or_refused(changes, missing):
    values = config_to_hf(GPTConfig(n_layer=1, n_head=2, n_embd=8)) | changes
    with contextlib.suppress(UserError):
        config_from_hf({name: v for name, v in values.items() if name not in missing})


# ---- the hub


@pytest.mark.parametrize(("name", "repo"), [("gpt2-xl", "openai-community/gpt2-xl"), ("someone/model", "someone/model")])
def test_hub_names_lead_to_folders_and_failures_to_one_line(monkeypatch, folder, name, repo):
    def download(asked, allow_patterns, **how):
        assert asked == repo
        assert not any("bin" in pattern or pattern == "*" for pattern in allow_patterns)  # never a pickle
        return str(folder)

    def fail(*args, **how):
        raise RuntimeError("no network\nand much more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert pretrained.load_hub(name).cfg.n_layer == 1
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(UserError, match=f"cannot load {repo} from the hub .no network") as refusal:
        pretrained.load_hub(name)
    assert "\n" not in str(refusal.value)


@pytest.fixture(scope="module")
def hub():
    """Skips, aloud, unless the hub answers within seconds."""
    from huggingface_hub import constants

    try:
        urllib.request.urlopen(f"{constants.ENDPOINT}/openai-community/gpt2/resolve/main/config.json", timeout=5).close()
    except OSError as e:
        pytest.skip(f"the Hugging Face hub cannot be reached, so the REAL WEIGHTS ARE NOT TESTED here: {e}")


@pytest.mark.network
def test_real_weights_give_their_known_answers(hub):
    """transformers' own tests' answers (FACTS.md): a greedy continuation, and the largest logits of a last token."""
    from sample import generate

    model = pretrained.load_hub("gpt2").eval()
    tokens = [int(t) for t in generate(model, [464, 3290], 18, temperature=0)]
    assert tokens == [373, 1043, 287, 257, 2214, 1474, 262, 16246, 286, 2688, 290, 2688, 27262, 13, 198, 198, 464, 3290]
    with torch.inference_mode():
        logits = model(torch.tensor([[6601, 32704, 795, 30132, 2985, 284]]))[0, -1]
    top = logits.topk(3)
    assert top.indices.tolist() == [38350, 2251, 766]
    assert top.values.tolist() == pytest.approx([-135.9132, -136.6836, -137.1203], abs=1e-2)


@pytest.mark.network
@pytest.mark.parametrize("size", GPT2_SIZES)
def test_real_weights_of_every_size_agree_with_transformers(hub, size):
    model = pretrained.load_hub(size).eval()
    hf = transformers.GPT2LMHeadModel.from_pretrained(f"openai-community/{size}").eval()
    assert_same_logits(model, hf, 50257, atol=1e-2)  # the logits are of size 100
