"""GPT-2 weights from the Hugging Face layout, and back into it.

In that layout linears are "Conv1D": their matrices lie transposed, (in, out). Names are ours but for an optional
"transformer." prefix. Read: config.json and safetensors, from a folder or from the hub by name. Never a pickle.

Written: a folder that transformers' AutoModelForCausalLM and AutoTokenizer read without conversion, with any of our tokenizers.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from base.download import Source
from base.errors import UserError
from base.files import open_regular, read_text, write_atomically
from configurator import GPTConfig, check_sizes
from model import GPT, GPT2_SIZES
from tokenizer import END_OF_TEXT, GPT2_MERGES, GPT2_RANKS, BPETokenizer, CharTokenizer, GPT2Tokenizer, Tokenizer, cache_dir

CONV1D = re.compile(r"(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight$")
# What our model computes; a Hugging Face config that says otherwise describes another model.
FIXED = dict(model_type="gpt2", activation_function="gelu_new", layer_norm_epsilon=1e-5, n_inner=None)
FIXED |= dict(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)


def config_from_hf(values: dict) -> GPTConfig:
    """A Hugging Face GPT-2 config.json as our GPTConfig; UserError for what our model does not compute."""
    if not isinstance(values, dict):
        raise UserError("config.json is not a JSON object")
    values = {"n_positions": values.get("n_ctx")} | values  # by its older name
    sizes = {name: values.get(name) for name in ("n_layer", "n_head", "n_embd", "vocab_size", "n_positions")}
    for name, found in sizes.items():
        if type(found) is not int:
            raise UserError(f"config.json has {name}={found!r}; it must be a whole number")
    sizes["block_size"] = sizes.pop("n_positions")
    check_sizes(sizes)
    for name, expected in FIXED.items():
        found = values.get(name, expected)
        if found != expected and not (name == "n_inner" and found == 4 * sizes["n_embd"]):
            raise UserError(f"config.json has {name}={found!r}; this model is GPT-2 with {name}={expected!r}")
    tied = values.get("tie_word_embeddings", True)
    if type(tied) is not bool:
        raise UserError(f"config.json has tie_word_embeddings={tied!r}; it must be true or false")
    return GPTConfig(**sizes, tie_weights=tied)


def config_to_hf(cfg: GPTConfig) -> dict:
    """Our config as a Hugging Face GPT-2 config.json."""
    sizes = dict(n_layer=cfg.n_layer, n_head=cfg.n_head, n_embd=cfg.n_embd, vocab_size=cfg.vocab_size)
    drops = dict(resid_pdrop=cfg.dropout, embd_pdrop=cfg.dropout, attn_pdrop=cfg.dropout)
    end = cfg.vocab_size - 1 if cfg.vocab_size == 50257 else None  # <|endoftext|>, where the vocabulary is GPT-2's
    extra = dict(architectures=["GPT2LMHeadModel"], tie_word_embeddings=cfg.tie_weights, bos_token_id=end, eos_token_id=end)
    return FIXED | sizes | drops | extra | dict(n_positions=cfg.block_size)


def from_hf_state(state: dict[str, Tensor], cfg: GPTConfig) -> dict[str, Tensor]:
    """Tensors in the Hugging Face layout -> our state dict (of the unpadded vocabulary)."""
    ours = {}
    for name, tensor in state.items():
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # the causal mask, which old files store
        if not name.startswith(("transformer.", "lm_head.")):
            name = "transformer." + name
        ours[name] = tensor.t().contiguous() if CONV1D.search(name) else tensor
    if cfg.tie_weights and "transformer.wte.weight" in ours:
        ours["lm_head.weight"] = ours["transformer.wte.weight"]
    return ours


def to_hf_state(model: GPT) -> dict[str, Tensor]:
    """Our weights in the Hugging Face layout, without padding rows; missing biases become zeros, which is the same."""
    V = model.cfg.vocab_size
    state = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.cfg.tie_weights:
            continue
        if name in ("lm_head.weight", "transformer.wte.weight"):
            tensor = tensor[:V]
        state[name] = (tensor.t() if CONV1D.search(name) else tensor).detach().cpu().contiguous()
        if (not model.cfg.bias and name.startswith("transformer.h.")) or name == "transformer.ln_f.weight":
            state.setdefault(name.removesuffix("weight") + "bias", torch.zeros(tensor.size(0)))
    return state


def checked_load(model: GPT, state: dict[str, Tensor], where: str) -> None:
    """Load a state dict of unknown origin into a model; UserError names the first key that does not fit."""
    expected = model.state_dict()
    # the head last: where it is shared, what is wrong is the embedding, which the file does hold
    for name in sorted(expected.keys() | state.keys(), key=lambda n: (n.startswith("lm_head"), n)):
        if name not in state:
            raise UserError(f"{where}: {name} is missing")
        if name not in expected:
            raise UserError(f"{where}: {name} does not belong to this model")
        if state[name].shape != expected[name].shape:
            raise UserError(f"{where}: {name} has shape {list(state[name].shape)}, expected {list(expected[name].shape)}")
        if not state[name].is_floating_point():
            raise UserError(f"{where}: {name} is {state[name].dtype}, expected floating point")
    if model.lm_head.weight.is_meta:
        model.load_state_dict({k: v.float() for k, v in state.items()}, assign=True)
        model.tie_weights()  # assigning made two parameters of one
    else:
        model.load_state_dict(state)  # into the parameters that an optimizer may hold


def empty_model(cfg: GPTConfig) -> GPT:
    """A model without memory or weights, for checked_load to fill."""
    with torch.device("meta"):
        return GPT(cfg)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file; UserError if it is not safetensors."""
    try:
        open_regular(path).close()  # a FIFO would make the library wait
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError, ValueError) as e:
        raise UserError(f"{path} is not a readable safetensors file: {e}") from None


def load_hf_dir(folder: Path) -> GPT:
    """A model from a folder in the Hugging Face layout, sharded or not."""
    try:
        cfg = config_from_hf(json.loads(read_text(folder / "config.json")))
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{folder}/config.json cannot be read: {e}") from None
    one = folder / "model.safetensors"
    files = [one] if one.is_file() else sorted(folder.glob("model-*-of-*.safetensors"))
    if not files:
        raise UserError(f"{folder} holds no model.safetensors (pickled weights, pytorch_model.bin, are never opened)")
    state: dict[str, Tensor] = {}
    for file in files:
        state |= read_safetensors(file)
    # a file may say "tied" and still store the head: believe it only where the two agree
    head, wte = state.get("lm_head.weight"), state.get("transformer.wte.weight", state.get("wte.weight"))
    if cfg.tie_weights and head is not None and wte is not None and not torch.equal(head, wte):
        cfg = replace(cfg, tie_weights=False)
    model = empty_model(cfg)
    checked_load(model, from_hf_state(state, cfg), str(folder))
    return model


def load_hub(name: str) -> GPT:
    """A model by its hub name: gpt2, gpt2-medium, gpt2-large, gpt2-xl, or owner/name in GPT-2's layout."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"loading {name} from the hub needs a package: run pip install huggingface_hub") from None
    repo = f"openai-community/{name}" if name in GPT2_SIZES else name
    try:
        # etag_timeout: an unreachable hub is known after seconds
        folder = snapshot_download(repo, allow_patterns=["config.json", "model*.safetensors"], etag_timeout=10)
    except Exception as e:  # it raises a dozen types, most of them "no network"
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        local = f"there is no folder {name}, and " if "/" in name else ""
        raise UserError(
            f"{local}cannot load {repo} from the hub ({reason[:150]}); a local folder with its files works too"
        ) from None
    return load_hf_dir(Path(folder))


def save_hf_dir(model: GPT, folder: Path, **more: object) -> None:
    """Write config.json, with some values more, and model.safetensors in the Hugging Face layout."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "config.json", json.dumps(config_to_hf(model.cfg) | more, indent=1).encode())
    write_atomically(folder / "model.safetensors", safetensors.torch.save(to_hf_state(model), metadata={"format": "pt"}))


# ---- export -----------------------------------------------------------------------------------------------------------

# How GPT-2's files write bytes (openai/gpt-2, src/encoder.py): those that print as themselves, the others from U+0100 on.
PRINTING = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
OTHERS = [byte for byte in range(256) if byte not in PRINTING]
SPELLING = {byte: chr(byte) if byte in PRINTING else chr(256 + OTHERS.index(byte)) for byte in range(256)}
# Two programs add in different orders, so float32 logits differ by rounding; by more than this share of the largest, or of 1,
# they are other logits. (A transposed matrix or a missing bias moves them by about their own size.)
MOST_APART = 1e-4
SAMPLE = "Hello, I'm a language model: don't  stop.\n\n\t3.14 naïve cafés, 日本語, žluť 🙂 \n "


def spelled(token: bytes) -> str:
    """A token as GPT-2's vocab.json and merges.txt write it: " the" is "Ġthe"."""
    return "".join(SPELLING[byte] for byte in token)


def gpt2_file(source: Source) -> bytes:
    """One of GPT-2's two files (they are in that layout) from where tiktoken keeps it: by the sha1 of its address."""
    return (cache_dir() / hashlib.sha1(source.url.encode()).hexdigest()).read_bytes()


def bpe_files(tokenizer: GPT2Tokenizer | BPETokenizer) -> tuple[dict[str, int], list[str], dict[str, int]]:
    """(vocab.json, the lines of merges.txt, special tokens and their ids) of a byte-level BPE."""
    if isinstance(tokenizer, BPETokenizer):
        tokens, specials = tokenizer.tokens, tokenizer.special_ids
        vocab = {spelled(token): i for i, token in enumerate(tokens[: len(tokens) - len(specials)])} | specials
        if len(vocab) < len(tokens):  # never of tokenizers that were trained: their special tokens are cut out of the text
            raise UserError(
                "a special token of this tokenizer is spelled like an ordinary one: transformers could not tell them apart"
            )
        return vocab, [f"{spelled(tokens[a])} {spelled(tokens[b])}" for a, b in tokenizer.merges], specials
    tokenizer.encode("a")  # downloads its two files to where tiktoken looks for them
    vocab, merges = json.loads(gpt2_file(GPT2_RANKS)), gpt2_file(GPT2_MERGES).decode().splitlines()[1:]
    return vocab, merges, {END_OF_TEXT: vocab[END_OF_TEXT]}


def tokenizer_files(tokenizer: Tokenizer, block_size: int) -> dict[str, bytes]:
    """What AutoTokenizer reads, {name: content}: the same ids for the same text. vocab.json and merges.txt for older readers.

    A character that a character tokenizer does not know is an error there too. In theirs special tokens are told apart in any
    text, as is the custom; in ours they are text, unless asked for.
    """
    config: dict = {"model_max_length": block_size, "clean_up_tokenization_spaces": False}
    whole: dict = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None}
    files = {}
    if isinstance(tokenizer, CharTokenizer):
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        cut = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
        # a name is required; no such token is in the vocabulary, so unknown characters are refused
        words = {"type": "WordLevel", "vocab": tokenizer.id_of, "unk_token": "<unknown>"}
        whole |= {"pre_tokenizer": cut, "post_processor": None, "decoder": {"type": "Fuse"}, "model": words}
    else:
        vocab, merges, specials = bpe_files(tokenizer)
        config |= {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}
        config |= {f"{kind}_token": END_OF_TEXT for kind in ("bos", "eos", "unk")}
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        whole["added_tokens"] = [{"id": i, "content": token} | plain for token, i in specials.items()]
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        whole |= {"pre_tokenizer": level, "post_processor": None, "decoder": level}
        whole["model"] = {"type": "BPE", "vocab": vocab, "merges": merges}
        files["vocab.json"] = json.dumps(vocab, ensure_ascii=False).encode()
        files["merges.txt"] = "\n".join(["#version: 0.2", *merges, ""]).encode()
    files["tokenizer_config.json"] = json.dumps(config, indent=1).encode()
    return files | {"tokenizer.json": json.dumps(whole, ensure_ascii=False).encode()}


@torch.no_grad()
def compare(model: GPT, tokenizer: Tokenizer, folder: Path) -> tuple[float, float]:
    """(largest difference of logits between transformers' model in a folder and ours, largest logit), both in float32.

    UserError if transformers cannot read the folder, or reads other ids out of a text.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(str(folder), local_files_only=True).float().eval()
        encoder = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as e:  # of any type: it runs through four libraries
        raise UserError(f"transformers does not read it: {type(e).__name__}: {str(e).strip().partition(chr(10))[0]}") from None
    random = torch.Generator().manual_seed(0)
    idx = torch.randint(model.cfg.vocab_size, (2, min(model.cfg.block_size, 256)), generator=random)
    ours, found = model(idx).float(), theirs(idx).logits
    ordinary = tokenizer.vocab_size - (0 if isinstance(tokenizer, CharTokenizer) else len(bpe_files(tokenizer)[2]))
    text = tokenizer.decode(torch.randint(ordinary, (2000,), generator=random).tolist())
    if isinstance(tokenizer, CharTokenizer):
        text += "".join(tokenizer.characters)
    else:  # not any character: what is a letter depends on which Unicode a library knows
        text = SAMPLE + "".join(c for c in text if c.isascii())
    ids = tokenizer.encode(text)
    if encoder.encode(text, add_special_tokens=False) != ids or encoder.decode(ids) != text:
        raise UserError("transformers makes other tokens of the same text")
    return (ours - found).abs().max().item(), ours.abs().max().item()


def export_hf(model: GPT, tokenizer: Tokenizer, to: Path, say: Callable[[str], None] = print) -> float | None:
    """Write a model (on the CPU, in float32) and its tokenizer in the Hugging Face layout, completely or not at all.

    If transformers is installed it reads the folder back: returns the largest difference of logits, else None. UserError if
    `to` already exists or cannot be written, or if transformers computes anything else from it.
    """
    if to.exists() and not (to.is_dir() and not any(to.iterdir())):
        raise UserError(f"{to} already exists: use another path")
    temporary = to.absolute().with_name(f".{to.absolute().name}.{os.getpid()}")
    difference = None
    try:
        save_hf_dir(model.eval(), temporary, bos_token_id=tokenizer.end_of_text, eos_token_id=tokenizer.end_of_text)
        for name, content in tokenizer_files(tokenizer, model.cfg.block_size).items():
            write_atomically(temporary / name, content)
        if find_spec("transformers"):
            difference, largest = compare(model, tokenizer, temporary)
            if not difference <= MOST_APART * max(1.0, largest):  # or NaN
                raise UserError(f"transformers computes something else from it: logits differ by {difference:.1e}")
            say(f"transformers reads it: same tokens, logits up to {largest:.3g}, largest difference {difference:.1e}")
        else:
            say("not checked: transformers is not installed (pip install transformers, then export again)")
        os.rename(temporary, to)
    except OSError as e:
        raise UserError(f"cannot write {to}: {e.strerror or e}; use another path") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    say(f"done: {', '.join(sorted(path.name for path in to.iterdir()))} in {to}")
    return difference
