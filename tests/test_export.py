"""export.py and engine/pretrained.py: what is exported works in transformers unchanged, or nothing is left of it."""

import hashlib
import json

import pytest
import torch
from trained import assert_same_logits, randomised

from base.errors import UserError
from corpus import bpe
from engine import pretrained
from engine.pretrained import config_to_hf, export_hf, to_hf_state
from tokenizer import GPT2_MERGES, GPT2_RANKS, BPETokenizer, CharTokenizer, GPT2Tokenizer

transformers = pytest.importorskip("transformers", reason="transformers is the oracle of these tests")


# ---- export

PROSE = "The cat sat on the mat, and it's the cat's mat.  Žluť 🙂 日本\n\n\tIn 1492 \u2028 the <|user|> ran away. \n " * 5
TOKENIZERS = {
    "gpt2": GPT2Tokenizer(),
    "bpe": bpe.train([PROSE], 320),
    "bpe with special tokens": bpe.train([PROSE], 330, ("<|user|>", "<|end|>", "<|endoftext|>")),
    "bytes": BPETokenizer([]),
    "char": CharTokenizer.train(PROSE),
    "two characters": CharTokenizer(["a", "\n"]),
}


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.slow) if name == "gpt2" else name for name in TOKENIZERS])
def tokenizer(request):
    if request.param == "gpt2":
        request.getfixturevalue("gpt2_files")
    return TOKENIZERS[request.param]


def no_trace_of(folder):
    return not folder.exists() and not list(folder.parent.glob(f".{folder.name}*"))


def small(tiny, kind="two characters", **changes):
    """(a random model, the tokenizer of that kind), which fit each other."""
    tokenizer = TOKENIZERS[kind]
    return randomised(tiny(vocab_size=tokenizer.vocab_size, **changes)), tokenizer


@pytest.mark.parametrize("changes", [{}, dict(tie_weights=False, vocab_multiple=64, bias=False)], ids=str)
def test_what_is_exported_works_in_transformers_as_it_is(tmp_path, tiny, tokenizer, changes):
    """The Auto classes find everything out by themselves: logits, ids, text, special tokens, the end of a document."""
    model, said, out = randomised(tiny(vocab_size=tokenizer.vocab_size, **changes)), [], tmp_path / "new" / "out"
    difference = export_hf(model, tokenizer, out, said.append)
    assert difference < 1e-4
    assert f"{difference:.1e}" in said[0]
    assert said[1].startswith("done: ")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    encoder = transformers.AutoTokenizer.from_pretrained(out)
    assert_same_logits(theirs, model, tokenizer.vocab_size)
    assert len(encoder) == tokenizer.vocab_size
    assert theirs.config.eos_token_id == encoder.eos_token_id == tokenizer.end_of_text
    assert encoder.model_max_length == theirs.config.n_positions == 32
    texts = ["a", "a\na", "\n", "aaa \n\n a", PROSE, PROSE[7:50], "cafés don't", "", " ", "\r\n\t", "\x00\x7f\xad\xa0"]
    if isinstance(tokenizer, CharTokenizer):
        texts = [t for t in texts if set(t) <= set(tokenizer.characters)]
    elif len(getattr(tokenizer, "special_tokens", ())) > 1:
        texts = [t.replace("<|user|>", "") for t in texts]  # special in theirs, text in ours
    for text in texts:
        ids = encoder.encode(text)
        assert ids == tokenizer.encode(text)
        assert encoder.decode(ids) == text
        assert encoder(text)["input_ids"] == ids  # nothing is put before or behind
    if isinstance(tokenizer, CharTokenizer):
        with pytest.raises(Exception, match="UNK"):
            encoder.encode("Ω")
        return
    for token, i in getattr(tokenizer, "special_ids", {"<|endoftext|>": tokenizer.end_of_text}).items():
        end = tokenizer.encode(" cat")
        assert encoder.encode(f"the{token} cat") == [*tokenizer.encode("the"), i, *end]
        assert encoder.decode([i, *end], skip_special_tokens=True) == " cat"
    (out / "tokenizer.json").unlink()  # the older files say the same
    assert transformers.AutoTokenizer.from_pretrained(out).encode(texts[4]) == tokenizer.encode(texts[4])


def test_gpt2s_own_files_come_out_as_openai_released_them(gpt2_files):
    files = pretrained.tokenizer_files(GPT2Tokenizer(), 1024)
    assert hashlib.sha256(files["merges.txt"]).hexdigest() == GPT2_MERGES.sha256
    assert json.loads(files["vocab.json"]) == json.loads(pretrained.gpt2_file(GPT2_RANKS))


def changed_state(name, change):
    """The file of one tensor is another than the model's."""
    return "to_hf_state", lambda model: (state := to_hf_state(model)) | {name: change(state[name]).contiguous()}


def other_tokens(tokenizer, positions, honest=pretrained.tokenizer_files):
    return honest(CharTokenizer(tokenizer.characters[::-1]), positions)


NO_TOKENIZER = {"tokenizer.json": b"{}", "tokenizer_config.json": b"{}"}
SABOTAGE = [  # (function of pretrained.py, what it does instead, message)
    (*changed_state("transformer.h.0.attn.c_proj.weight", torch.t), "logits differ by"),
    (*changed_state("transformer.ln_f.weight", lambda t: t * 1.001), "logits differ by"),
    ("config_to_hf", lambda cfg: config_to_hf(cfg) | {"n_embd": 64}, "does not read it"),
    ("tokenizer_files", other_tokens, "other tokens"),
    ("tokenizer_files", lambda tokenizer, positions: NO_TOKENIZER, "does not read it"),
]


@pytest.mark.parametrize(("function", "instead", "message"), SABOTAGE)
def test_what_comes_back_otherwise_is_refused_and_leaves_nothing(tmp_path, tiny, monkeypatch, function, instead, message):
    said = []
    monkeypatch.setattr(pretrained, function, instead)
    with pytest.raises(UserError, match=message) as refusal:
        export_hf(*small(tiny, "char"), tmp_path / "out", said.append)
    assert "\n" not in str(refusal.value)
    assert said == []
    assert no_trace_of(tmp_path / "out")


def test_a_model_that_is_not_finite_is_refused_but_large_logits_may_differ_by_more(tmp_path, tiny):
    """GPT-2's own reach -140, where float32 has steps of 1.5e-5."""
    model, tokenizer = small(tiny)
    model.transformer.ln_f.weight.data *= 1e4
    assert 1e-4 < export_hf(model, tokenizer, tmp_path / "large", print) < 1
    model.transformer.wpe.weight.data[3, 3] = float("nan")
    with pytest.raises(UserError, match="nan"):
        export_hf(model, tokenizer, tmp_path / "out", print)
    assert no_trace_of(tmp_path / "out")


def test_nothing_is_overwritten(tmp_path, tiny):
    model, tokenizer = small(tiny)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    for place, message in (("file", "already exists"), ("full", "already exists"), ("file/out", "cannot write")):
        with pytest.raises(UserError, match=message):
            export_hf(model, tokenizer, tmp_path / place, print)
    (tmp_path / "empty").mkdir()
    export_hf(model, tokenizer, tmp_path / "empty", print)
    assert (tmp_path / "file").read_text() == (tmp_path / "full" / "mine").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "full"]


def test_without_transformers_it_says_so(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    said = []
    assert export_hf(*small(tiny), tmp_path / "out", said.append) is None
    assert "not installed" in said[0]
    assert said[1].startswith("done")


def test_a_special_token_that_is_spelled_like_another_is_refused(tmp_path, tiny):
    """No training makes such merges; a stranger's tokenizer.json may."""
    spelling, merges = b"<|endoftext|>", []
    for k, byte in enumerate(spelling[1:]):
        merges.append([spelling[0] if k == 0 else 255 + k, byte])
    tokenizer = BPETokenizer(merges)
    assert tokenizer.decode([255 + len(merges)]) == "<|endoftext|>"
    with pytest.raises(UserError, match="spelled like"):
        export_hf(randomised(tiny(vocab_size=tokenizer.vocab_size)), tokenizer, tmp_path / "out", print)
    assert no_trace_of(tmp_path / "out")
