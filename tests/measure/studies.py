"""Invented scaling studies, whose law is known."""

import math

import numpy as np

from measure.scaling.family import Family, ScalingConfig
from report.results import law_loss

LAW = dict(E=1.2, A=8.0, alpha=0.3, B=60.0, beta=0.35)
BUDGETS = [5e9, 1e10, 2e10, 4e10]


def family(most_tokens: int = 1_003_854, **changes) -> Family:
    return Family(ScalingConfig(**changes), 65, most_tokens)


def invented(law: dict = LAW, seeds: int = 3, noise: float = 0.003, misfit: float = 0.002, number: int = 0) -> list[dict]:
    """Runs of the usual study whose losses follow a law: a point misses it by `misfit`, and its seeds differ by `noise`."""
    random, lab, runs = np.random.default_rng(number), family(), []
    for p in (p for c in BUDGETS for p in lab.level(c)):
        middle = law_loss(law, p.N, p.D) * math.exp(misfit * random.standard_normal())
        for seed in range(seeds):
            loss = middle * math.exp(noise * random.standard_normal())
            run = dict(N=p.N, D=p.D, C=p.C, flops=1.1 * p.C, n_embd=p.n_embd, n_layer=2, steps=p.D // 128, learning_rate=1e-2)
            runs.append({"budget": p.budget} | run | dict(seed=seed, loss=loss, seconds=1.0, started="2026-11-20T05:00:01"))
    return runs
