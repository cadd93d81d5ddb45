"""GPT-2 weights from the Hugging Face layout, and back into it.

In that layout linears are "Conv1D": their matrices lie transposed, (in, out). Names are ours but for an optional
"transformer." prefix. Read: config.json and safetensors, from a folder or from the hub by name. Never a pickle.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from model import GPT, GPT2_SIZES, GPTConfig, UserError
from tokenizer import write_atomically

CONV1D = re.compile(r"(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight$")
# What our model computes; a Hugging Face config that says otherwise is another model.
FIXED = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "n_inner": None,
    "add_cross_attention": False,
}


# Our sizes, and the names they have there ("n_ctx" is the older one).
HF_SIZES = {
    "n_layer": ("n_layer",),
    "n_head": ("n_head",),
    "n_embd": ("n_embd",),
    "vocab_size": ("vocab_size",),
    "block_size": ("n_positions", "n_ctx"),
}


def config_from_hf(values: dict) -> GPTConfig:
    """A Hugging Face GPT-2 config.json as ours; UserError for what our model does not compute."""
    if not isinstance(values, dict):
        raise UserError("config.json is not a JSON object")
    sizes = {}
    for name, names in HF_SIZES.items():
        found = next((values[n] for n in names if n in values), None)
        if type(found) is not int:
            raise UserError(f"config.json has {names[0]}={found!r}; it must be a whole number")
        sizes[name] = found
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
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError, ValueError) as e:
        raise UserError(f"{path} is not a readable safetensors file: {e}") from None


def load_hf_dir(folder: Path) -> GPT:
    """A model from a folder in the Hugging Face layout, sharded or not."""
    try:
        cfg = config_from_hf(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f"{folder}/config.json cannot be read: {e}") from None
    one = folder / "model.safetensors"
    files = [one] if one.is_file() else sorted(folder.glob("model-*-of-*.safetensors"))
    if not files:
        raise UserError(f"{folder} holds no model.safetensors (pickled weights, pytorch_model.bin, are never opened)")
    state: dict[str, Tensor] = {}
    for file in files:
        state |= read_safetensors(file)
    if not cfg.tie_weights or "lm_head.weight" in state:
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
        raise UserError(f"loading {name} from the hub needs a package: type pip install huggingface_hub") from None
    repo = f"openai-community/{name}" if name in GPT2_SIZES else name
    try:
        # etag_timeout: an unreachable hub is known after seconds
        folder = snapshot_download(repo, allow_patterns=["config.json", "model*.safetensors"], etag_timeout=10)
    except Exception as e:  # it raises a dozen kinds, most of them "no network"
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        local = f"there is no folder {name}, and " if "/" in name else ""
        raise UserError(
            f"{local}the hub does not give {repo} ({reason[:150]}); a local folder with its files works too"
        ) from None
    return load_hf_dir(Path(folder))


def save_hf_dir(model: GPT, folder: Path) -> None:
    """Write config.json and model.safetensors in the Hugging Face layout."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "config.json", json.dumps(config_to_hf(model.cfg), indent=1).encode())
    write_atomically(folder / "model.safetensors", safetensors.torch.save(to_hf_state(model), metadata={"format": "pt"}))
