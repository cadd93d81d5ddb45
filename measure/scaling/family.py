"""Which models a scaling study trains, on how many tokens, and what fits into the time."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from base import settings
from base.errors import UserError
from configurator import Config

LEVEL = 2.0  # a budget over the one below it
SEEDS = (3, 10)  # at least and at most, unless they are asked for
MIN_STEPS = 50  # a shorter run is warm-up; and rounding to whole steps stays within 1% of the budget
EVAL_TOKENS = 2**17  # of the validation split, the same for all: of tiny Shakespeare's characters all 111,540


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """What to train, and how much of it."""

    dataset: str = "shakespeare_char"
    """name of a folder in data_dir, made by prepare_data.py"""
    data_dir: str = "data"
    """folder of the prepared data sets"""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """where to train"""
    minutes: float = 12.0
    """how long all of it may take here: the budgets follow from that, and from how much data there is"""
    budgets: str = ""
    """FLOPs of one run by C = 6ND, e.g. 1e10,2e10,4e10, instead of what minutes allow"""
    levels: int = 4
    """how many budgets, each twice the one before"""
    sizes: int = 5
    """how many models for each budget"""
    spread: float = 8.0
    """the largest of them over the smallest, in parameters: wide enough to see both sides of the minimum"""
    seeds: int = 0
    """runs of each model at each budget: how far they differ is the noise; 0: as many as fit into the minutes, from 3 to 10"""
    held_out: float = 4.0
    """budget of the run that is predicted, in multiples of the largest that is fitted"""
    epochs: float = 1.0
    """how often the training tokens may be seen at most: repeated tokens teach less (Muennighoff et al. 2023: from 4 on)"""
    tokens_per_parameter: float = 50.0
    """of the middle size of each budget; the minimum should be near it (characters: 50, LOG.md; Chinchilla's tokens: 20)"""
    sequence_length: int = 32
    """T; attention is not in 6ND, so it is kept short"""
    tokens_per_step: int = 128
    """tokens per optimizer step; small, for there are few to learn from: half as many teach 0.02 nats more"""
    bootstraps: int = 1000
    """how often the fit is repeated for the intervals"""
    jobs: int = 0
    """models trained at a time; 0: one per core on a CPU, else one"""
    quick: bool = False
    """two budgets, three sizes, one seed, few steps: a first look, not a measurement"""
    out: str = "results"
    """folder for the results"""
    keep: str = ""
    """where finished runs are kept; empty: in runs/scale, beside the results"""

    def __post_init__(self):
        settings.check_types(vars(self), ScalingConfig)
        settings.check_at_least(self, 1, "sequence_length", "tokens_per_step", "bootstraps", "held_out")
        settings.check_at_least(self, 0, "jobs", "seeds")
        settings.check_at_least(self, 2, "levels")
        settings.check_at_least(self, 3, "sizes")
        settings.check_at_least(self, 2, "spread")
        for name in ("minutes", "epochs", "tokens_per_parameter"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name}={getattr(self, name)} must be above 0")
        if self.tokens_per_step % self.sequence_length:
            near = max(1, round(self.tokens_per_step / self.sequence_length)) * self.sequence_length
            raise UserError(
                f"tokens_per_step={self.tokens_per_step} is not a multiple of sequence_length={self.sequence_length}: "
                f"use --tokens_per_step={near}"
            )
        self.given_budgets()

    def given_budgets(self) -> list[float]:
        """The budgets that were given, in rising order."""
        try:
            found = sorted({float(word) for word in self.budgets.split(",") if word.strip()})
        except ValueError:
            found = [math.nan]
        if found and not (len(found) >= 2 and all(0 < c < math.inf for c in found)):
            raise UserError(f"budgets={self.budgets!r} must be two or more numbers of FLOPs: use --budgets=1e10,2e10,4e10")
        return found


# ---- the family -------------------------------------------------------------------------------------------------------

# Even widths, and from 192 on multiples of 64. At 768 this is GPT-2 124M; tiny ones keep two layers and two heads.
WIDTHS = [*range(8, 192, 2), *range(192, 1601, 64)]


def depth(n_embd: int) -> int:
    """Layers, and heads: as many as GPT-2 124M has for its width, but two at least: one cannot copy what it has seen."""
    return max(2, n_embd // 64)


def n_params(n_embd: int, vocab_size: int, T: int) -> int:
    """model.GPT's n_params(), in closed form: embeddings, blocks, last norm. The search for sizes asks for over a hundred
    models, which would take seconds to build; a test compares the two."""
    return n_embd * (vocab_size + T + 2) + depth(n_embd) * (12 * n_embd**2 + 13 * n_embd)


def learning_rate(n_embd: int) -> float:
    """0.042 / sqrt(n_embd), however long the training. At widths 12, 24 and 48, after 64K and 256K characters, the nearest of
    4e-3, 8e-3 and 1.6e-2 was within 0.02 nats of the best of them (LOG.md); muP's 1 / n_embd (Yang et al. 2022) falls faster.
    """
    return 0.042 / math.sqrt(n_embd)


@dataclass(frozen=True)
class Point:
    """One model at one budget."""

    budget: float  # FLOPs that were to be spent
    n_embd: int
    N: int  # parameters
    D: int  # tokens, whole steps of them

    @property
    def C(self) -> float:
        """FLOPs that are spent, by 6ND."""
        return 6.0 * self.N * self.D


@dataclass(frozen=True)
class Family:
    """All models of a study, and how many tokens there are for them."""

    study: ScalingConfig
    vocab_size: int
    most_tokens: int  # in one run

    def params(self, n_embd: int) -> int:
        return n_params(n_embd, self.vocab_size, self.study.sequence_length)

    def point(self, budget: float, N: float) -> Point | None:
        """The model with about N parameters at a budget; None if the data is too short for it, or the run would be."""
        step = self.study.tokens_per_step
        points = [Point(budget, w, n, round(budget / 6 / n / step) * step) for w in WIDTHS for n in [self.params(w)]]
        enough = [p for p in points if self.most_tokens >= p.D]
        nearest = min(enough, key=lambda p: abs(math.log(p.N / N)), default=None)
        return nearest if nearest and MIN_STEPS * step <= nearest.D else None

    def level(self, budget: float) -> list[Point]:
        """The models of a budget, from small to large: around tokens_per_parameter, but none that would run out of data."""
        study, middle = self.study, math.sqrt(budget / 6 / self.study.tokens_per_parameter)
        smallest = max(middle / math.sqrt(study.spread), budget / 6 / self.most_tokens, self.params(WIDTHS[0]))
        powers = [i / (study.sizes - 1) for i in range(study.sizes)]
        points = [self.point(budget, smallest * study.spread**i) for i in powers]
        return list(dict.fromkeys(p for p in points if p))

    def largest_budget(self) -> float:
        """The largest for which there is data: one size below the middle still sees each token `epochs` times at most."""
        below = self.study.spread ** (1 / (self.study.sizes - 1))
        middle = 6 * (self.most_tokens / below) ** 2 / self.study.tokens_per_parameter
        return max(middle, 6 * self.params(WIDTHS[0]) * self.most_tokens)

    def config(self, point: Point, seed: int, device: torch.device) -> Config:
        """The run of a point. The schedule ends with its last step: a loss out of the middle of a longer one is no point of the
        law (Hoffmann et al. 2022, section 3.1).
        """
        study, steps, rate = self.study, point.D // self.study.tokens_per_step, learning_rate(point.n_embd)
        return Config(
            dataset=study.dataset,
            data_dir=study.data_dir,
            vocab_size=self.vocab_size,
            n_layer=depth(point.n_embd),
            n_head=depth(point.n_embd),
            n_embd=point.n_embd,
            block_size=study.sequence_length,
            tokens_per_step=study.tokens_per_step,
            batch_size=study.tokens_per_step // study.sequence_length,
            max_steps=steps,
            learning_rate=rate,
            min_lr=rate / 10,
            warmup_steps=max(1, steps // 10),
            beta2=0.99,  # few tokens per step: a longer memory (nanoGPT's character configs)
            seed=seed,
            eval_tokens=EVAL_TOKENS,
            device=device.type,
            dtype="float32" if device.type == "cpu" else "auto",
            compile=False,
            curve="off",
        )


def round_down(x: float) -> float:
    """To two digits, so that a budget can be read."""
    unit = 10.0 ** (math.floor(math.log10(x)) - 1)
    return float(f"{math.floor(x / unit * (1 + 1e-9)) * unit:.1e}")


@dataclass(frozen=True)
class Plan:
    """What fits into the time."""

    budgets: list[float]
    seeds: int
    why: str  # they are not larger


def make_plan(family: Family, seconds: Callable[[Point], float], jobs: int) -> Plan:
    """The largest budgets for which there are data and minutes, and then as many seeds as the minutes allow.

    seconds: what one run of a point takes.
    """
    study, top, why = family.study, family.largest_budget(), "the data"
    while True:
        budgets = sorted(round_down(top / LEVEL**i) for i in range(study.levels))
        levels = [family.level(c) for c in budgets]
        if min(map(len, levels)) < 3:
            what, more = f"{study.minutes:g} minutes are", "more --minutes, fewer --levels"
            if why == "the data":
                what, more = f"{family.most_tokens:,} tokens are", "more --epochs, fewer --levels"
            raise UserError(f"{what} too few for {study.levels} budgets of three sizes here: use {more}, or --budgets=…")
        C = study.held_out * budgets[-1]
        larger = family.point(C, math.sqrt(C / 6 / study.tokens_per_parameter))
        last = seconds(larger) if larger else 0.0
        once = sum(seconds(p) for level in levels for p in level) / jobs

        def minutes(seeds: int, once: float = once, last: float = last) -> float:
            return (seeds * once + math.ceil(seeds / jobs) * last) / 60

        if minutes(study.seeds or SEEDS[0]) <= study.minutes:
            fits = [n for n in range(SEEDS[0], SEEDS[1] + 1) if minutes(n) <= study.minutes]
            return Plan(budgets, study.seeds or fits[-1], why)
        top, why = 0.9 * top, "the minutes"
