"""pretrained.py: GPT-2 weights through transformers and back, and files that are refused."""

import json
import math
import pickle
import urllib.request

import pytest
import safetensors.torch
import torch
from trained import Bomb, assert_same_logits, randomised

from base.errors import UserError
from engine import pretrained
from engine.pretrained import load_hf_dir, save_hf_dir, to_hf_state
from model import GPT2_SIZES

transformers = pytest.importorskip("transformers", reason="transformers is the oracle of these tests")


def theirs(**changes):
    """A narrow transformers GPT-2 with every parameter random."""
    torch.manual_seed(0)
    shape = dict(n_layer=2, n_head=16, n_embd=128, vocab_size=100, n_positions=16)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape | changes)).eval()
    for p in model.parameters():
        p.data.normal_(mean=1.0 if p.dim() == 1 else 0.0, std=0.1 if p.dim() == 1 else 0.05)
    return model


def test_weights_travel_from_transformers_and_back(tmp_path):
    """transformers -> folder -> ours: equal logits; ours -> state: the same bits."""
    hf = theirs()
    hf.save_pretrained(tmp_path)
    model = load_hf_dir(tmp_path).eval()
    assert (model.cfg.n_head, model.cfg.block_size) == (16, 16)
    assert_same_logits(model, hf, 100)
    back, original = to_hf_state(model), hf.state_dict()
    assert original.keys() - back.keys() == {"lm_head.weight"}  # tied: stored once
    assert all(torch.equal(back[name], original[name]) for name in back)


@pytest.mark.parametrize("changes", [{}, dict(tie_weights=False, vocab_multiple=64), dict(bias=False)], ids=str)
def test_what_is_exported_is_read_by_us_bit_for_bit(tmp_path, tiny, changes):
    """Padding stays behind, absent biases become zeros. What transformers makes of it: test_export.py."""
    model = randomised(tiny(**changes))
    save_hf_dir(model, tmp_path)
    again, before = load_hf_dir(tmp_path), model.state_dict()
    assert again.cfg == tiny(tie_weights=model.cfg.tie_weights)
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
    hf = theirs(tie_word_embeddings=False)
    hf.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    for tied in (False, True):
        (tmp_path / "config.json").write_text(json.dumps(values | {"tie_word_embeddings": tied}))
        assert_same_logits(load_hf_dir(tmp_path).eval(), hf, 100)


# ---- refusals


@pytest.fixture
def hf_folder(tmp_path, tiny):
    save_hf_dir(randomised(tiny(n_layer=1)), tmp_path)
    return tmp_path


def test_pickled_weights_are_never_opened(hf_folder):
    (hf_folder / "model.safetensors").unlink()
    (hf_folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(hf_folder / "ran")))
    with pytest.raises(UserError, match="pickle"):
        load_hf_dir(hf_folder)
    (hf_folder / "pytorch_model.bin").rename(hf_folder / "model.safetensors")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load_hf_dir(hf_folder)
    assert not (hf_folder / "ran").exists()


POSITIONS, MATRIX = "transformer.wpe.weight", "transformer.h.0.mlp.c_fc.weight"
SPOILT = {  # what is wrong -> (the key, its tensor from the right one, the message)
    "missing": ("transformer.h.0.ln_1.bias", lambda t: None, "is missing"),
    "another head": ("score.weight", lambda t: torch.zeros(3), "does not belong"),
    "a row less": (POSITIONS, lambda t: t[:-1].clone(), "has shape"),
    "not transposed": (MATRIX, lambda t: t.t().contiguous(), "has shape"),  # nn.Linear's instead of Conv1D's
    "whole numbers": (POSITIONS, lambda t: t.to(torch.int32), "is torch.int32"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_key_that_does_not_fit_is_named(hf_folder, what):
    key, change, message = SPOILT[what]
    state = safetensors.torch.load_file(hf_folder / "model.safetensors")
    changed = change(state.pop(key, None))
    safetensors.torch.save_file(state | ({} if changed is None else {key: changed}), hf_folder / "model.safetensors")
    with pytest.raises(UserError, match=f"{key} {message}"):
        load_hf_dir(hf_folder)


@pytest.mark.parametrize(
    "values",
    [
        *(dict(activation_function="relu"), dict(model_type="llama"), dict(layer_norm_epsilon=1e-6), dict(n_inner=100)),
        *(dict(scale_attn_by_inverse_layer_idx=True), dict(n_layer="many"), dict(n_head=None), dict(n_head=5)),
        *(dict(n_layer=math.inf), dict(n_embd=None, n_inner=3), dict(activation_function=["gelu_new"])),
    ],
    ids=str,
)
def test_another_architecture_is_refused_by_name(hf_folder, values):
    """The usual inner width, though, may be written out."""
    path = hf_folder / "config.json"
    for changes in (dict(n_inner=4 * 32), values):
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        if changes is not values:
            load_hf_dir(hf_folder)
    with pytest.raises(UserError, match=next(iter(values))):
        load_hf_dir(hf_folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[1, 2]", None, b"[" * 100_000], ids=lambda b: repr(b)[:9])
def test_files_that_are_something_else_are_refused_by_name(hf_folder, name, content):
    """None: what it was, truncated."""
    (hf_folder / name).write_bytes((hf_folder / name).read_bytes()[:-1] if content is None else content)
    with pytest.raises(UserError, match=name):
        load_hf_dir(hf_folder)


# ---- the hub


@pytest.mark.parametrize(("name", "repo"), [("gpt2-xl", "openai-community/gpt2-xl"), ("someone/model", "someone/model")])
def test_hub_names_lead_to_folders_and_failures_to_one_line(monkeypatch, hf_folder, name, repo):
    def download(asked, allow_patterns, **how):
        assert asked == repo
        assert not any("bin" in pattern or pattern == "*" for pattern in allow_patterns)  # never a pickle
        return str(hf_folder)

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
