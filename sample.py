"""Continue a prompt.

    python sample.py out/shakespeare --prompt "ROMEO:"        a run of ours, its newest checkpoint
    python sample.py gpt2 --prompt "Hello, I'm a language model,"     GPT-2 from the hub (also gpt2-medium, -large, -xl)
    python sample.py path/to/hf_dir --temperature=0           a folder in the Hugging Face layout, greedily
    python sample.py config/stages/s1_inference.py            random weights
    echo "To be" | python sample.py out/shakespeare --prompt -    the prompt from standard input
    python sample.py out/large --draft=out/small              the same distribution, faster: the small model proposes
    python sample.py out/shakespeare --quantize=int8          weights in fewer bits: nearly the same, faster

The model sees at most block_size tokens. A longer prompt keeps its last block_size. Longer texts continue in a window:
whenever it is full, the oldest half is forgotten, so a new token never costs more than one position on average two.
"""

import codecs
import functools
import itertools
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from base import settings
from base.errors import UserError, entry
from model import GPT, KVCache
from tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How to continue a prompt."""

    prompt: str = ""
    """text to continue; "-" reads standard input; empty: the model begins as its training text does"""
    prompt_file: str = ""
    """read the prompt from this UTF-8 file instead"""
    max_new_tokens: int = 200
    """how many tokens to add at most; <|endoftext|> ends a sample sooner"""
    num_samples: int = 1
    """how many continuations: the k-th (1, 2, …) is what --seed=seed+k-1 gives alone"""
    temperature: float = 0.8
    """divides the logits: 0 is greedy, 1 is the model's own distribution"""
    top_k: int = 200
    """draw among the k likeliest tokens only; 0: all"""
    top_p: float = 1.0
    """draw among the likeliest tokens that together have this probability; 1: all"""
    seed: int = 1337
    """seed of the random draws"""
    kv_cache: bool = True
    """keep keys and values of the past; False computes every position again for each token (slow, the same text)"""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """where to compute"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """precision of the weights and of the arithmetic; auto: the fastest one here that gives float32's greedy text, which is
    bfloat16 with the kernel in C where that runs, else float32"""
    quantize: Literal["none", "int8", "int4"] = "none"
    """weights in fewer bits: int8 with a scale per row, int4 with one per 32 (variants/quantize.py says what it costs)"""
    draft: str = ""
    """a smaller model of the same vocabulary, whose proposals the model accepts or replaces: the same distribution, faster"""
    draft_tokens: int = 4
    """how many tokens the draft proposes at a time"""

    def __post_init__(self):
        settings.check_types(vars(self), SampleConfig)
        settings.check_at_least(self, 0, "max_new_tokens", "temperature", "top_k", "seed")
        settings.check_at_least(self, 1, "num_samples", "draft_tokens")
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"top_p={self.top_p} must lie in (0, 1]")
        if self.prompt and self.prompt_file:
            raise UserError("prompt and prompt_file exclude each other: use one of them")
        if self.quantize != "none" and self.dtype == "float32":
            raise UserError(f"quantize={self.quantize} is for decoding in 16 bits: leave out --dtype=float32")
        if self.draft and self.num_samples > 1:
            raise UserError(f"draft={self.draft} proposes for one sample, not {self.num_samples}: use --num_samples=1")
        if self.draft and not self.kv_cache:
            raise UserError(f"draft={self.draft} needs the cache: leave out --kv_cache=False")
        if self.draft_tokens != 4 and not self.draft:
            raise UserError(f"draft_tokens={self.draft_tokens} is for a draft model: use --draft=out/smaller as well")


def likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(largest logit, its id), (B, 1) each; the lowest id on ties. UserError if a row has NaN, or infinity as its largest."""
    values, ids = logits.max(1, keepdim=True)  # NaN if any of the row is
    if not values.isfinite().all():
        raise UserError("the model's logits are NaN or infinite: its weights are damaged, or too large for this --dtype")
    return values, ids


def next_distribution(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Probabilities (B, V) to draw from, given logits (B, V). temperature 0 puts all on the likeliest (lowest id on ties)."""
    largest, best = likeliest(logits)
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(1, best, 1.0)
    # Shifted to a maximum of 0 and divided by at least 1e-30, so that no temperature above 0 can overflow.
    logits = (logits.float() - largest.float()) / max(temperature, 1e-30)
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


class DecodeState:
    """What a model has seen, and how much of it is in its cache. The window's rule is here (see the top of this file)."""

    def __init__(self, model: GPT, prompt: list[int], num_samples: int = 1, kv_cache: bool = True):
        """prompt: at least one id; its last block_size are seen, by each of num_samples sequences."""
        assert prompt, "there must be at least one token to start from"
        weight = model.transformer.wpe.weight
        self.model, self.window = model, model.cfg.block_size
        self.seen = torch.tensor([prompt[-self.window :]] * num_samples, device=weight.device)  # (B, S)
        self.cache = KVCache(model.cfg, num_samples, weight.device, weight.dtype) if kv_cache else None

    @property
    def room(self) -> int:
        """Tokens that can be added before the window moves."""
        return self.window - self.seen.size(1)

    def logits(self, count: int = 1) -> Tensor:
        """(B, count, V): after each of the last `count` tokens, which must not be in the cache."""
        fresh = self.seen[:, self.cache.length :] if self.cache else self.seen
        return self.model(fresh, cache=self.cache, last_only=count == 1)[:, -count:]

    def add(self, tokens: Tensor) -> None:
        """Tokens (B, n). A window that overflows keeps its newer half: positions are absolute, so it is read again from 0."""
        self.seen = torch.cat((self.seen, tokens), dim=1)
        if self.seen.size(1) > self.window:
            self.seen = self.seen[:, -max(1, self.window // 2) :]
            if self.cache:
                self.cache.length = 0

    def forget(self, count: int) -> None:
        """Undo the last `count` tokens, added since the window moved last."""
        self.seen = self.seen[:, : self.seen.size(1) - count]
        if self.cache:
            self.cache.length = min(self.cache.length, self.seen.size(1))


@torch.no_grad()  # not inference_mode: sharded models (train.py writes samples) cannot be read in it
def generate(
    model: GPT, prompt: list[int], max_new_tokens: int, *, num_samples: int = 1, seed: int = 1337, kv_cache: bool = True, **how
) -> Iterator[Tensor]:
    """Yield the next token of each sample, (num_samples,) int64 on the CPU, max_new_tokens times.

    prompt: at least one id. how: temperature, top_k, top_p of next_distribution(). The tokens are the same with and without
    the cache: what the model sees depends on the number of tokens alone (see the top of this file).
    """
    past = DecodeState(model, prompt, num_samples, kv_cache)
    device = past.seen.device
    streams = [torch.Generator(device=device).manual_seed(seed + i) for i in range(num_samples)]  # each sample has its own
    for _ in range(max_new_tokens):
        logits = past.logits()[:, -1]
        if how.get("temperature") == 0:  # no distribution is needed, which is faster
            token = likeliest(logits)[1]
        else:
            rows = next_distribution(logits, **how).split(1)
            token = torch.cat([torch.multinomial(p, 1, generator=g) for p, g in zip(rows, streams, strict=True)])
        yield token[:, 0].cpu()
        past.add(token)


@dataclass
class SpeculationStats:
    """What became of the proposals so far."""

    proposed: int = 0
    accepted: int = 0
    passes: int = 0  # forward passes of the model itself

    def summary(self, seconds: float) -> str:
        made, share = self.accepted + self.passes, self.accepted / max(1, self.proposed)
        told = f"draft: {self.accepted} of {self.proposed} proposals accepted ({share:.0%}), "
        told += f"{made / max(1, self.passes):.2f} tokens per pass of the model, {made / seconds:.1f} tokens/s"
        if self.proposed >= 20 and share < 0.2:
            told += "\nwarning: the model hardly accepts what this draft proposes: leave out --draft, which only costs time"
        return told


@torch.no_grad()
def speculate(
    model: GPT, draft: GPT, prompt: list[int], max_new_tokens: int, counts: SpeculationStats, draft_tokens=4, seed=1337, **how
) -> Iterator[Tensor]:
    """generate() for one sample, faster: a small draft model proposes tokens, the model reads them all in one pass.

    A proposal x, drawn from the draft's q, is accepted with probability min(1, p(x) / q(x)), p being the model's. The first
    that is not is replaced by a draw from max(0, p - q), normalised; if all are, the pass yields one token more.
    So every token has the distribution p exactly, whatever the draft (Leviathan et al. 2023, theorem in appendix A), and
    with temperature 0 the tokens are generate()'s. Both models must have the same vocabulary.
    """
    past, ahead = DecodeState(model, prompt), DecodeState(draft, prompt)
    random = torch.Generator(device=past.seen.device).manual_seed(seed)

    def draw(p: Tensor) -> Tensor:
        return torch.multinomial(p, 1, generator=random)  # of a distribution on one token (temperature 0): that token

    left = max_new_tokens
    while left:
        n = min(draft_tokens, left - 1, past.room, ahead.room)  # no window moves under a proposal
        proposals, q = [], []
        for _ in range(n):
            q.append(next_distribution(ahead.logits()[:, -1], **how))
            proposals.append(draw(q[-1]))
            ahead.add(proposals[-1])
        if proposals:
            past.add(torch.cat(proposals, dim=1))
        p = next_distribution(past.logits(n + 1)[0], **how).split(1)  # n + 1 times (1, V)
        chances = torch.rand(n, generator=random, device=past.seen.device)
        kept = 0
        # u < p/q, written so that it never divides; q(x) > 0, since x was drawn from it
        while kept < n and chances[kept] * q[kept][0, proposals[kept]] < p[kept][0, proposals[kept]]:
            kept += 1
        rest = (p[kept] - q[kept]).clamp(min=0) if kept < n else p[kept]
        after = draw(rest if rest.any() else p[kept])  # nothing is left where p and q differ by rounding alone
        past.forget(n - kept)
        ahead.forget(n - kept)
        past.add(after)
        ahead.add(after)
        counts.proposed, counts.accepted, counts.passes = counts.proposed + n, counts.accepted + kept, counts.passes + 1
        left -= kept + 1
        yield from (token[:, 0].cpu() for token in (*proposals[:kept], after))


def read_prompt(cfg: SampleConfig) -> str:
    """The prompt, wherever it comes from; UserError if that cannot be read."""
    try:
        if cfg.prompt == "-":
            return sys.stdin.buffer.read().decode("utf-8")
        return Path(cfg.prompt_file).read_bytes().decode("utf-8") if cfg.prompt_file else cfg.prompt
    except UnicodeDecodeError as e:
        raise UserError(f"the prompt is not UTF-8 (byte {e.start})") from None
    except OSError as e:
        raise UserError(f"cannot read prompt_file={cfg.prompt_file}: {e.strerror}") from None


def print_stream(tokens: Iterator[Tensor], tokenizer: Tokenizer, text: str) -> None:
    """Print one sample while it is generated."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # holds back the bytes of half a character
    print(text, end="", flush=True)
    for token in itertools.takewhile(lambda token: token.item() != tokenizer.end_of_text, tokens):
        print(decoder.decode(tokenizer.decode_bytes([token.item()])), end="", flush=True)
    print(decoder.decode(b"", final=True))


def print_batch(tokens: Iterator[Tensor], tokenizer: Tokenizer, text: str, count: int) -> None:
    """Print several samples once all are complete."""
    columns = list(zip(*(row.tolist() for row in tokens), strict=True)) or [()] * count
    for number, ids in enumerate(columns, 1):
        shown = list(itertools.takewhile(lambda token: token != tokenizer.end_of_text, ids))
        print(f"--- sample {number} of {count} ---\n{text}{tokenizer.decode(shown)}")


def main(argv: list[str]) -> None:
    places, flags = settings.split_positional(SampleConfig(), argv)
    cfg = settings.parse(SampleConfig(), flags, __doc__)
    if not places:
        raise UserError('which model? use python sample.py out/shakespeare --prompt "ROMEO:" (one model, then settings)')
    if len(places) > 1:
        meant = shlex.join(["python", "sample.py", places[0], "--prompt", " ".join(places[1:])])
        raise UserError(f"{places[1]!r} is one argument too many; if it is the prompt, use {meant}")
    from engine import machine, restore  # after --help
    from kernels import decode

    text, device = read_prompt(cfg), machine.pick_device(cfg.device)
    say = functools.partial(print, file=sys.stderr)
    model, tokenizer = restore.load_named(places[0], say)
    one_token = cfg.kv_cache and not cfg.draft  # at a time, which is what the kernel computes
    model, dtype = decode.prepare(model, places[0], device, cfg.dtype, cfg.quantize, one_token)
    kernel = cfg.kv_cache and isinstance(model, decode.Decoder)
    prompt = tokenizer.encode(text) or [tokenizer.start]
    if cfg.draft:
        draft, other = restore.load_model(cfg.draft, say)
        if other.to_json() != tokenizer.to_json():
            raise UserError(f"{cfg.draft} and {places[0]} have different vocabularies: a draft needs the model's own")
        draft, _ = decode.prepare(draft, cfg.draft, device, dtype)
    if cfg.dtype == "auto":
        weights = f", from {cfg.quantize} weights" if cfg.quantize != "none" else ""
        say(f"computing in {dtype} on {device.type}{', with the kernel in C' if kernel else ''}{weights}")
    if len(prompt) > model.cfg.block_size:
        say(f"the prompt has {len(prompt)} tokens: only its last {model.cfg.block_size} are used")
    how = dict(temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p)
    if cfg.draft:
        counts, began = SpeculationStats(), time.perf_counter()
        how |= dict(draft_tokens=cfg.draft_tokens, seed=cfg.seed)
        print_stream(speculate(model, draft, prompt, cfg.max_new_tokens, counts, **how), tokenizer, text)
        return say(counts.summary(time.perf_counter() - began))
    several = cfg.num_samples > 1
    if several and not kernel:
        how |= dict(kv_cache=cfg.kv_cache, num_samples=cfg.num_samples, seed=cfg.seed)
        return print_batch(generate(model, prompt, cfg.max_new_tokens, **how), tokenizer, text, cfg.num_samples)
    for number in range(cfg.num_samples):  # the kernel computes one at a time
        print(f"--- sample {number + 1} of {cfg.num_samples} ---\n" * several, end="")
        tokens = generate(model, prompt, cfg.max_new_tokens, seed=cfg.seed + number, kv_cache=cfg.kv_cache, **how)
        print_stream(tokens, tokenizer, text)


if __name__ == "__main__":
    entry(main)
