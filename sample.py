"""Continue a prompt.

    python sample.py out/shakespeare --prompt "ROMEO:"        a run of ours, its newest checkpoint
    python sample.py gpt2 --prompt "Hello, I'm a language model,"     GPT-2 from the hub (also gpt2-medium, -large, -xl)
    python sample.py path/to/hf_dir --temperature=0           a folder in the Hugging Face layout, greedily
    python sample.py config/stages/s1_inference.py            random weights
    echo "To be" | python sample.py out/shakespeare --prompt -    the prompt from standard input

The model sees at most block_size tokens. A longer prompt keeps its last block_size. Text longer than that goes on in a window:
whenever it is full, the oldest half is forgotten, so a new token never costs more than one position on average two.
"""

import codecs
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import configurator
from model import GPT, KVCache, UserError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to continue a prompt."""

    prompt: str = ""
    """text to continue; "-" reads standard input; empty starts a document"""
    prompt_file: str = ""
    """read the prompt from this UTF-8 file instead"""
    max_new_tokens: int = 200
    """how many tokens to add at most; <|endoftext|> ends a sample sooner"""
    num_samples: int = 1
    """continuations, computed as one batch"""
    temperature: float = 0.8
    """divides the logits: 0 is greedy, 1 is the model's own distribution"""
    top_k: int = 200
    """draw among the k likeliest tokens only; 0: all"""
    top_p: float = 1.0
    """draw among the likeliest tokens that together have this probability; 1: all"""
    seed: int = 1337
    """of the draws"""
    kv_cache: bool = True
    """keep keys and values of the past; False computes every position anew for each token (slow, the same text)"""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """where to compute"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """precision of the weights and of the arithmetic"""

    def __post_init__(self):
        configurator.check_types(vars(self), Sampling)
        configurator.check_at_least(self, 0, "max_new_tokens", "temperature", "top_k", "seed")
        configurator.check_at_least(self, 1, "num_samples")
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"top_p={self.top_p} must lie in (0, 1]")
        if self.prompt and self.prompt_file:
            raise UserError("prompt and prompt_file exclude each other: type one of them")


def next_distribution(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Probabilities (B, V) to draw from, given logits (B, V). temperature 0 puts all on the likeliest (lowest id on ties)."""
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(1, logits.argmax(1, keepdim=True), 1.0)
    # Shifted to a maximum of 0 and divided by at least 1e-30, so that no temperature above 0 can overflow.
    logits = logits.float()
    logits = (logits - logits.max(1, keepdim=True).values) / max(temperature, 1e-30)
    if 0 < top_k < logits.size(1):
        values, ids = logits.topk(top_k)  # exactly k, even where logits tie
        logits = torch.full_like(logits, float("-inf")).scatter_(1, ids, values)
    if top_p < 1.0:
        ordered, ids = logits.sort(descending=True)
        p = ordered.softmax(1)
        # a token stays if those before it have less than top_p: the first always does
        ordered = ordered.masked_fill(p.cumsum(1) - p >= max(top_p, 1e-30), float("-inf"))
        logits = torch.full_like(logits, float("-inf")).scatter_(1, ids, ordered)
    return logits.softmax(1)


@torch.no_grad()  # not inference_mode: sharded models (train.py writes samples) cannot be read in it
def generate(
    model: GPT,
    prompt: list[int],
    max_new_tokens: int,
    *,
    num_samples: int = 1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 1337,
    kv_cache: bool = True,
) -> Iterator[Tensor]:
    """Yield the next token of each sample, (num_samples,) int64 on the CPU, max_new_tokens times.

    prompt: at least one id. With or without the cache the same tokens come out: what the model sees is decided by the
    number of tokens alone (see the top of this file).
    """
    assert prompt, "generate() needs at least one token to start from"
    window = model.cfg.block_size
    weight = model.lm_head.weight
    random = torch.Generator(device=weight.device).manual_seed(seed)
    seen = torch.tensor([prompt[-window:]] * num_samples, device=weight.device)  # (B, S): what the model may look at
    cache = KVCache(model.cfg, num_samples, weight.device, weight.dtype) if kv_cache else None
    fresh = seen  # the part of it that is not in the cache
    for _ in range(max_new_tokens):
        logits = model(fresh if cache else seen, cache=cache, last_only=True)[:, -1]
        p = next_distribution(logits, temperature, top_k, top_p)
        token = p.argmax(1, keepdim=True) if temperature == 0 else torch.multinomial(p, 1, generator=random)
        yield token[:, 0].cpu()
        seen = fresh = torch.cat((seen, token), dim=1)
        if cache and seen.size(1) <= window:
            fresh = token
        elif seen.size(1) > window:
            # full: positions are absolute, so the newer half is read again from position 0
            seen = fresh = seen[:, -max(1, window // 2) :]
            if cache:
                cache.length = 0


def read_prompt(cfg: Sampling) -> str:
    """The prompt, wherever it comes from; UserError if that cannot be read."""
    try:
        if cfg.prompt == "-":
            return sys.stdin.buffer.read().decode("utf-8")
        return Path(cfg.prompt_file).read_bytes().decode("utf-8") if cfg.prompt_file else cfg.prompt
    except UnicodeDecodeError as e:
        raise UserError(f"the prompt is not UTF-8 (byte {e.start})") from None
    except OSError as e:
        raise UserError(f"cannot read prompt_file={cfg.prompt_file}: {e.strerror}") from None


def main(argv: list[str]) -> None:
    places, flags = configurator.split_positional(Sampling(), argv)
    cfg = configurator.parse(Sampling(), flags, __doc__)
    if len(places) != 1:
        raise UserError('which model? type python sample.py out/shakespeare --prompt "ROMEO:" (one model, then settings)')
    import checkpoint  # after --help
    import machine

    text = read_prompt(cfg)
    device = machine.pick_device(cfg.device)
    model, tokenizer = checkpoint.load_model(places[0], say=lambda line: print(line, file=sys.stderr))
    model = model.to(device, machine.DTYPES[cfg.dtype]).eval()
    prompt = tokenizer.encode(text) or [tokenizer.start]
    if len(prompt) > model.cfg.block_size:
        print(f"the prompt has {len(prompt)} tokens: its last {model.cfg.block_size} are used", file=sys.stderr)
    tokens = generate(
        model,
        prompt,
        cfg.max_new_tokens,
        num_samples=cfg.num_samples,
        temperature=cfg.temperature,
        top_k=cfg.top_k,
        top_p=cfg.top_p,
        seed=cfg.seed,
        kv_cache=cfg.kv_cache,
    )
    if cfg.num_samples == 1:
        # a character may be spread over several tokens: hold its bytes back until it is whole
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        print(text, end="", flush=True)
        for token in tokens:
            if token.item() == tokenizer.end_of_text:
                break
            print(decoder.decode(tokenizer.decode_bytes([token.item()])), end="", flush=True)
        print(decoder.decode(b"", final=True))
        return
    columns = torch.stack(list(tokens), dim=1).tolist() if cfg.max_new_tokens else [[]] * cfg.num_samples
    for number, ids in enumerate(columns, 1):
        end = ids.index(tokenizer.end_of_text) if tokenizer.end_of_text in ids else len(ids)
        print(f"--- sample {number} of {cfg.num_samples} ---\n{text}{tokenizer.decode(ids[:end])}")


if __name__ == "__main__":
    configurator.entry(main)
