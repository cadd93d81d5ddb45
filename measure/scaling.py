"""Scaling laws, measured on this machine: how the loss falls with parameters N and tokens D, and a check by prediction.

    python prepare_data.py shakespeare_char
    python scale.py                              a family of small GPTs, in twelve minutes
    python scale.py --minutes=60 --dataset=mine --tokens_per_parameter=20
    python scale.py --budgets=1e10,2e10,4e10     these budgets, in FLOPs of one run, however long they take
    python scale.py --quick                      a look, in seconds

Each budget C is spent on models of several sizes; by C = 6ND a larger one sees fewer tokens. The law L = E + A/N^α + B/D^β is
fitted to all of them and predicts a larger run. That is written down, and only then the run is trained. Finished runs stay in
out/scale and are not done again: after Ctrl-C or a kill the same command goes on.

N is all parameters, embeddings included, as Chinchilla counts (Hoffmann et al. 2022): the token matrix is also the head and
multiplies each token. The models are so small that each has a core to itself; a compile would take longer than their training,
and on a CPU casts to bf16 cost such matmuls more than they save: hence eager, and there in float32 (LOG.md).
"""

import contextlib
import datetime
import hashlib
import json
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

import bench
import configurator
from base import errors, system
from base.errors import UserError
from base.files import write_atomically
from configurator import Config
from corpus import shards
from engine import machine
from engine.effective import effective, mismatches
from engine.run import build
from report.kinds import as_text
from report.results import law_loss

LEVEL = 2.0  # a budget over the one below it
SEEDS = (3, 10)  # at least and at most, unless they are asked for
MIN_STEPS = 50  # a shorter run is warm-up; and rounding to whole steps stays within 1% of the budget
EVAL_TOKENS = 2**17  # of the validation split, the same for all: of tiny Shakespeare's characters all 111,540
EVAL_BATCH = 64  # sequences at a time in the evaluation
DECIDES = ("model.py", "optim.py", "data.py", "train.py")  # code that a kept run must have been made with
PARAMETERS = ("E", "A", "alpha", "B", "beta")


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """What to train, and how much of it."""

    dataset: str = "shakespeare_char"
    """name of a folder in data_dir, made by prepare_data.py"""
    data_dir: str = "data"
    """where prepared data sets lie"""
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
    """two budgets, three sizes, one seed, few steps: a look, not a measurement"""
    out: str = "results"
    """folder for the results"""
    keep: str = "out/scale"
    """where finished runs are kept"""

    def __post_init__(self):
        configurator.check_types(vars(self), ScalingConfig)
        configurator.check_at_least(self, 1, "sequence_length", "tokens_per_step", "bootstraps", "held_out")
        configurator.check_at_least(self, 0, "jobs", "seeds")
        configurator.check_at_least(self, 2, "levels")
        configurator.check_at_least(self, 3, "sizes")
        configurator.check_at_least(self, 2, "spread")
        for name in ("minutes", "epochs", "tokens_per_parameter"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name}={getattr(self, name)} must be above 0")
        if self.tokens_per_step % self.sequence_length:
            near = max(1, round(self.tokens_per_step / self.sequence_length)) * self.sequence_length
            raise UserError(
                f"tokens_per_step={self.tokens_per_step} is not a multiple of sequence_length={self.sequence_length}: "
                f"type --tokens_per_step={near}"
            )
        self.given_budgets()

    def given_budgets(self) -> list[float]:
        """The budgets that were typed, in rising order."""
        try:
            found = sorted({float(word) for word in self.budgets.split(",") if word.strip()})
        except ValueError:
            found = [math.nan]
        if found and not (len(found) >= 2 and all(0 < c < math.inf for c in found)):
            raise UserError(f"budgets={self.budgets!r} are not two or more numbers of FLOPs: type --budgets=1e10,2e10,4e10")
        return found


# ---- the family -------------------------------------------------------------------------------------------------------

# Even widths, and from 192 on multiples of 64. At 768 this is GPT-2 124M; tiny ones keep two layers and two heads.
WIDTHS = [*range(8, 192, 2), *range(192, 1601, 64)]


def depth(n_embd: int) -> int:
    """Layers, and heads: as many as GPT-2 124M has for its width, but two at least: one cannot copy what it has seen."""
    return max(2, n_embd // 64)


def n_params(n_embd: int, vocab_size: int, T: int) -> int:
    """model.GPT's n_params() (a test compares the two): embeddings, blocks, last norm."""
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
                what, more = f"{family.most_tokens:,} tokens are", "--epochs=… or fewer --levels"
            raise UserError(f"{what} too few for {study.levels} budgets of three sizes here: type {more}, or --budgets=…")
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


# ---- training ---------------------------------------------------------------------------------------------------------


def train_one(cfg: Config) -> dict:
    """Train a model with build and train.train_step to the end of its schedule, and evaluate it."""
    import train

    started, began = now(), time.perf_counter()
    run = build(cfg)
    for step in range(cfg.max_steps):
        train.train_step(run, step)
    if wrong := mismatches(run, effective(run)):
        raise UserError("; ".join(wrong))
    run.micro_batch = EVAL_BATCH  # changes nothing but its speed
    loss = train.validation(run)["loss"]
    N, D = run.model.n_params(), cfg.max_steps * cfg.tokens_per_step
    result = {"N": N, "D": D, "C": 6 * N * D, "flops": cfg.flops_per_token(cfg.T) * D, "n_embd": cfg.n_embd}
    result |= {"n_layer": cfg.n_layer, "steps": cfg.max_steps, "learning_rate": cfg.learning_rate, "seed": cfg.seed}
    run.close()
    return result | {"loss": loss, "seconds": time.perf_counter() - began, "started": started}


def time_step(cfg: Config) -> float:
    """Seconds that one step takes: the median of twenty."""
    import train

    run = build(cfg)
    seconds, warmup = bench.time_steps(lambda step: train.train_step(run, step), 20, 15)
    run.close()
    return float(np.median(seconds[warmup:]))


def serve(threads: int) -> None:
    """A worker's life: a job a line on stdin, its result a line on stdout, until the pipe ends. It does when the process that
    started this one ends, however that happens; the run in hand is finished and kept.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal: the first one decides
    torch.set_num_threads(threads)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # nothing that is printed may get between the answers
    for line in sys.stdin:
        job = json.loads(line)
        cfg = Config(**job["config"])
        try:
            if job["what"] == "time":
                result: Any = {"seconds": time_step(cfg)}
            else:
                result = train_one(cfg)
                write_atomically(Path(job["path"]), json.dumps({"config": job["config"], "result": result}, indent=1).encode())
        except UserError as e:
            result = {"error": f"n_embd={cfg.n_embd}, {cfg.max_steps} steps: {e}"}
        answers.write(json.dumps(result) + "\n")
        answers.flush()


@contextlib.contextmanager
def workers(count: int, threads: int) -> Iterator[Callable[[dict], dict]]:
    """A function that lets one of up to `count` processes do a job and returns its result; threads may call it side by side."""
    command = [sys.executable, str(Path(__file__).resolve()), "worker", str(threads)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")
    processes: list[subprocess.Popen] = []
    idle: queue.SimpleQueue[subprocess.Popen] = queue.SimpleQueue()
    starting = threading.Lock()

    def someone() -> subprocess.Popen:
        with starting:
            if idle.empty() and len(processes) < count:
                processes.append(subprocess.Popen(command, **pipes))
                return processes[-1]
        return idle.get()

    def ask(job: dict) -> dict:
        process = someone()
        try:
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except (OSError, ValueError):
            answer = ""
        idle.put(process)  # a dead one as well: who waits for it shall not wait for ever
        if not answer:
            raise UserError(f"a process that trained ended with {process.wait()}: the same command goes on after the last run")
        result = json.loads(answer)
        if "error" in result:
            raise UserError(result["error"])
        return result

    try:
        yield ask
    finally:
        for process in processes:
            process.kill()
            process.wait()


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:20]


@dataclass(frozen=True)
class RunCache:
    """Finished runs on disk, each under a name that follows from all that decides its loss."""

    folder: Path
    facts: dict  # besides the config: data, code, versions

    def path(self, what: str, value: dict) -> Path:
        known = {k: v for k, v in value.items() if k not in ("data_dir", "out_dir")}
        return self.folder / f"{what}_{digest([self.facts, known])}.json"

    def read(self, path: Path) -> dict | None:
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:
            raise UserError(f"{path} is damaged: delete it") from None


# ---- the law ----------------------------------------------------------------------------------------------------------


class LawFit:
    """ln L over (ln N, ln D), to be fitted as Hoffmann et al. 2022 do (section 3.3): ln(E + A/N^α + B/D^β) by the Huber loss.

    theta = (ln E, ln of A/N^α, ln of B/D^β, α, β), the terms at the middle of the data: there they hardly depend on α and β.
    """

    LOWEST, HIGHEST = [-7.0, -7.0, -7.0, 0.0, 0.0], [3.0, 3.0, 3.0, 3.0, 3.0]

    def __init__(self, N: np.ndarray, D: np.ndarray, L: np.ndarray, delta: float):
        self.n, self.d, self.loss, self.delta = np.log(N), np.log(D), np.log(L), delta
        self.middle = self.n.mean(), self.d.mean()

    def terms(self, theta: np.ndarray, rows: np.ndarray) -> np.ndarray:
        n, d = self.n[rows] - self.middle[0], self.d[rows] - self.middle[1]
        return np.stack([np.full_like(n, theta[0]), theta[1] - theta[3] * n, theta[2] - theta[4] * d])

    def residuals(self, theta: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """ln L of the law minus ln L measured."""
        return np.logaddexp.reduce(self.terms(theta, rows)) - self.loss[rows]

    def jacobian(self, theta: np.ndarray, rows: np.ndarray) -> np.ndarray:
        terms = self.terms(theta, rows)
        share = np.exp(terms - np.logaddexp.reduce(terms))
        n, d = self.n[rows] - self.middle[0], self.d[rows] - self.middle[1]
        return np.stack([*share, -share[1] * n, -share[2] * d], axis=1)

    def solve(self, rows: np.ndarray, starts: list) -> np.ndarray:
        """The best theta for some of the runs (one may be named twice), from each of the starts."""
        from scipy.optimize import least_squares  # here: scipy takes half a second to load

        how = dict(loss="huber", f_scale=self.delta, bounds=(self.LOWEST, self.HIGHEST), x_scale="jac", max_nfev=300)
        found = [least_squares(self.residuals, start, self.jacobian, args=(rows,), **how) for start in starts]
        return min(found, key=lambda f: f.cost).x

    def starts(self) -> list[tuple]:
        """E as one, two or three quarters of the loss, the rest shared out equally, and slow and fast powers."""
        middle = self.loss.mean()
        return [
            (middle + math.log(e), *[middle + math.log((1 - e) / 2)] * 2, a, b)
            for e in (0.25, 0.5, 0.75)
            for a in (0.1, 0.3, 0.8)
            for b in (0.1, 0.3, 0.8)
        ]

    def law(self, theta: np.ndarray) -> dict[str, float]:
        """In the usual form."""
        e, a, b, alpha, beta = map(float, theta)
        terms = math.exp(e), math.exp(a + alpha * self.middle[0]), math.exp(b + beta * self.middle[1])
        return dict(zip(PARAMETERS, (terms[0], terms[1], alpha, terms[2], beta), strict=True))


def best_size(law: dict[str, float], C: float) -> float:
    """The N that the law finds best for C = 6ND: where αA/N^α = βB/D^β. NaN or infinite if a power is 0."""
    alpha, beta = np.float64(law["alpha"]), np.float64(law["beta"])
    with np.errstate(all="ignore"):
        ratio = (alpha * law["A"] / (beta * law["B"])) ** (1 / (alpha + beta))
        return float(ratio * (C / 6) ** (beta / (alpha + beta)))


def finite(value: float) -> float | None:
    """A number as JSON has them."""
    return float(value) if math.isfinite(value) else None


def interval(values: list[float] | np.ndarray) -> list[float | None]:
    """[low, high]: the middle 95%; None for an end that is not finite."""
    ordered = np.sort(np.nan_to_num(np.asarray(values, dtype=float), nan=np.inf))
    last = len(ordered) - 1
    return [finite(ordered[math.floor(0.025 * last)]), finite(ordered[math.ceil(0.975 * last)])]


class Analysis:
    """Everything that is computed from the runs of a study: once from all of them, and again from each of many resamples."""

    def __init__(self, runs: list[dict], bootstraps: int, seed: int = 0):
        self.runs, self.random = runs, np.random.default_rng(seed)
        self.points: dict[tuple, list[int]] = defaultdict(list)  # (budget, N, D) -> which runs: its seeds
        for i, run in enumerate(runs):
            self.points[run["budget"], run["N"], run["D"]].append(i)
        if len(self.points) <= len(PARAMETERS):
            known = f"{len(self.points)} points are too few for a law of {len(PARAMETERS)} parameters"
            raise UserError(f"{known}: type more --sizes or --levels")
        N, D, self.L = (np.array([r[k] for r in runs], dtype=float) for k in ("N", "D", "loss"))
        self.noise = self.noise_of_seeds()
        # 1.345 deviations: normal noise costs Huber's loss 5% there; 1e-3 is Chinchilla's, for when there is no noise
        self.surface = LawFit(N, D, self.L, max(1e-3, 1.345 * (self.noise or 0.0)))
        theta = self.surface.solve(np.arange(len(runs)), self.surface.starts())
        self.law = self.surface.law(theta)
        self.misfit = np.array([self.surface.residuals(theta, np.array(rows)).mean() for rows in self.points.values()])
        self.laws = [self.surface.law(self.surface.solve(self.resample(), [theta])) for _ in range(bootstraps)]

    def noise_of_seeds(self) -> float | None:
        """Standard deviation of ln L between seeds, pooled over all points; None if nothing was repeated."""
        groups = [np.log(self.L[rows]) for rows in self.points.values()]
        freedom = sum(len(g) - 1 for g in groups)
        return math.sqrt(sum(((g - g.mean()) ** 2).sum() for g in groups) / freedom) if freedom else None

    def resample(self) -> np.ndarray:
        """As many points as there are, drawn with replacement, each with all its seeds: by how much the law misses a point is
        common to them. Drawn again if they are no more than the law has parameters.
        """
        rows = list(self.points.values())
        while True:
            drawn = self.random.integers(0, len(rows), len(rows))
            if len(set(drawn)) > len(PARAMETERS):
                return np.concatenate([rows[i] for i in drawn])

    def predict(self, N: float, D: float) -> dict:
        """The mean loss of a point that was not fitted, with a 95% interval: what the law of each resample says, times by how
        much the law misses a point. It misses those it was fitted to by less than others: hence the root.
        """
        root = math.sqrt(len(self.misfit) / (len(self.misfit) - len(PARAMETERS)))
        missed = np.exp(-root * self.random.choice(self.misfit, len(self.laws)))
        low, high = interval([law_loss(law, N, D) * m for law, m in zip(self.laws, missed, strict=True)])
        return {"loss": law_loss(self.law, N, D), "low": low, "high": high}

    def parabola(self, budget: float) -> tuple[dict, np.ndarray]:
        """Chinchilla's second approach: where a parabola of L over ln N through the points of a budget is least.

        Its intervals come from the noise between seeds alone; there are none if nothing was repeated, or if one parabola in
        twenty has no minimum among the sizes. Also returns ln N at the minimum: measured, then one for each draw of noise.
        """
        rows = [(math.log(N), found) for (c, N, _), found in self.points.items() if c == budget]
        x, L = np.array([n for n, _ in rows]), np.array([self.L[found].mean() for _, found in rows])
        error = (self.noise or 0.0) * L / np.sqrt([len(found) for _, found in rows])
        draws = L + error * self.random.standard_normal((len(self.laws), len(L)))
        a, b, c = np.polyfit(x - x.mean(), np.vstack([L, draws]).T, 2)
        with np.errstate(all="ignore"):
            least = x.mean() - b / (2 * a)
            least[(a <= 0) | (least < x.min()) | (least > x.max())] = math.nan
        result = dict.fromkeys(("N", "ratio", "loss", "N_interval", "ratio_interval"))
        if not math.isnan(least[0]):
            N = math.exp(least[0])
            result |= {"N": N, "ratio": budget / 6 / N**2, "loss": float(c[0] - b[0] ** 2 / (4 * a[0]))}
            if self.noise and np.isnan(least).mean() < 0.05:
                sizes = np.exp(least[~np.isnan(least)])
                result |= {"N_interval": interval(sizes), "ratio_interval": interval(budget / 6 / sizes**2)}
        return result, least

    def optimum(self, C: float) -> dict:
        """The best size for a budget by the law, with 95% intervals."""
        sizes = np.array([best_size(law, C) for law in (self.law, *self.laws)])
        with np.errstate(all="ignore"):
            ratios = C / 6 / sizes**2
        result = {"N": finite(sizes[0]), "ratio": finite(ratios[0])}
        return result | {"N_interval": interval(sizes[1:]), "ratio_interval": interval(ratios[1:])}

    def exponents(self, minima: dict[float, np.ndarray]) -> dict:
        """a in N ∝ C^a: by the law, and through the minima of the parabolas."""
        with np.errstate(all="ignore"):
            powers = [np.float64(law["beta"]) / (law["alpha"] + law["beta"]) for law in (self.law, *self.laws)]
        result = {"law": finite(powers[0]), "law_interval": interval(powers[1:]), "parabolas": None, "parabolas_interval": None}
        known = {c: least for c, least in minima.items() if not math.isnan(least[0])}
        if len(known) > 1:
            least = np.array(list(known.values()))
            slopes = np.polyfit(np.log(list(known)), least[:, ~np.isnan(least).any(axis=0)], 1)[0]
            result["parabolas"] = float(slopes[0])
            result["parabolas_interval"] = interval(slopes[1:]) if self.noise and len(slopes) > 1 else None
        return result

    def summary(self) -> dict:
        """All of it as JSON values, but for predictions."""
        found = {c: self.parabola(c) for c in sorted({budget for budget, _, _ in self.points})}
        return {
            "law": self.law,
            "intervals": {k: interval([law[k] for law in self.laws]) for k in PARAMETERS},
            "huber_delta": self.surface.delta,
            "noise": self.noise,
            "misfit": float(np.sqrt((self.misfit**2).mean())),
            "levels": [{"budget": c, "parabola": p, "law": self.optimum(c)} for c, (p, _) in found.items()],
            "exponent": self.exponents({c: least for c, (_, least) in found.items()}),
        }


# ---- the study --------------------------------------------------------------------------------------------------------


@dataclass
class StudyRunner:
    """What a study is done with."""

    family: Family
    device: torch.device
    keeper: RunCache
    ask: Callable[[dict], dict]  # lets a worker do a job
    jobs: int  # how many at a time

    def measure(self, points: list[Point], seeds: int, what: str) -> list[dict]:
        """Every point with every seed: a kept result, or a new one. The longest begin first."""
        todo = [(p, self.family.config(p, Config.seed + s, self.device)) for p in points for s in range(seeds)]
        paths = [self.keeper.path("run", asdict(cfg)) for _, cfg in todo]
        results = {path: kept["result"] for path in paths if (kept := self.keeper.read(path))}
        missing = {path: cfg for path, (_, cfg) in zip(paths, todo, strict=True) if path not in results}
        cost = {path: cfg.max_steps * (32 + cfg.n_embd) for path, cfg in missing.items()}
        pool, form = ThreadPoolExecutor(self.jobs), "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
        try:
            with tqdm(total=sum(cost.values()), desc=what, disable=None, bar_format=form) as bar:
                asked = {}
                for path in sorted(missing, key=cost.get, reverse=True):
                    job = {"what": "train", "config": asdict(missing[path]), "path": str(path)}
                    asked[pool.submit(self.ask, job)] = path
                for future in as_completed(asked):
                    results[asked[future]] = future.result()
                    bar.update(cost[asked[future]])
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return [{"budget": p.budget} | results[path] for (p, _), path in zip(todo, paths, strict=True)]

    def plan(self) -> Plan:
        """The budgets that were typed; or those that fit into the minutes: measured once and then kept, so that the same
        command goes on with the same runs.
        """
        study, family = self.family.study, self.family
        if given := study.given_budgets():
            return Plan(given, study.seeds or SEEDS[0], "the command line")
        if study.quick:  # the least in which the largest model still makes enough steps
            least = round_down(6.9 * study.spread * family.params(WIDTHS[0]) * MIN_STEPS * study.tokens_per_step)
            return Plan([least * LEVEL**i for i in range(study.levels)], study.seeds or 1, "--quick")
        deciding = {k: v for k, v in asdict(study).items() if k not in ("bootstraps", "out", "keep")}
        path = self.keeper.path("plan", deciding)
        if kept := self.keeper.read(path):
            return Plan(**kept)
        widths = (8, 64) if self.device.type == "cpu" else (64, 512)
        points = [Point(0.0, w, family.params(w), MIN_STEPS * study.tokens_per_step) for w in widths]
        jobs = [{"what": "time", "config": asdict(family.config(p, 0, self.device))} for p in points for _ in range(self.jobs)]
        with ThreadPoolExecutor(self.jobs) as pool:  # all at work, as they will be
            times = [answer["seconds"] for answer in pool.map(self.ask, jobs)]
        small, large = max(times[: self.jobs]), max(times[self.jobs :])
        slope = max(0.0, (large - small) / (points[1].N - points[0].N))

        def seconds(p: Point) -> float:
            step = small + slope * max(0, p.N - points[0].N)
            return step * (p.D + EVAL_TOKENS / 6) / study.tokens_per_step  # a forward pass is a third of a step, at most

        plan = make_plan(family, seconds, self.jobs)
        write_atomically(path, json.dumps(asdict(plan)).encode())
        return plan

    def prediction(self, analysis: Analysis, larger: Point, runs: list[dict]) -> dict:
        """What is said of a larger run, kept with the time at which it was first said."""
        known = {"runs": runs, "bootstraps": len(analysis.laws), "larger": asdict(larger)}
        path = self.keeper.path("prediction", known)
        kept = self.keeper.read(path)
        if not kept:
            kept = {"predicted": analysis.predict(larger.N, larger.D), "predicted_at": now()}
            write_atomically(path, json.dumps(kept, indent=1).encode())
        return kept


def run_study(lab: StudyRunner, head: dict, tokens: int, write: Callable[[dict], None]) -> dict:
    """The whole study. write() is called with the result as soon as the prediction is made, and again at the end."""
    study, family, plan = lab.family.study, lab.family, lab.plan()
    levels = [family.level(c) for c in plan.budgets]
    if bad := next((c for c, level in zip(plan.budgets, levels, strict=True) if len(level) < 3), None):
        known = f"for {bad:g} FLOPs there are no three sizes between {MIN_STEPS} steps and {study.epochs:g} epochs"
        raise UserError(f"{known} of {study.dataset}: type other --budgets, or --epochs=…")
    for points in levels:
        small, large = points[0], points[-1]
        print(
            f"C = {small.budget:.2g}: {len(points)} sizes, N = {small.N:,} to {large.N:,} (n_embd {small.n_embd} to "
            f"{large.n_embd}), D = {small.D:,} to {large.D:,}"
        )
    most = max(p.D for points in levels for p in points)
    print(
        f"{plan.seeds} seed(s) of each; budgets limited by {plan.why}; at most {most / tokens:.2f} epochs of {tokens:,} tokens"
    )
    runs = lab.measure([p for points in levels for p in points], plan.seeds, "training")
    analysis = Analysis(runs, study.bootstraps)
    C = study.held_out * plan.budgets[-1]
    best = best_size(analysis.law, C)
    larger = family.point(C, best) if 0 < best < math.inf else None
    if not larger:
        raise UserError(f"no run of {C:g} FLOPs fits into {study.epochs:g} epochs, to be predicted: type a smaller --held_out")
    held = {"budget": C, "n_embd": larger.n_embd, "N": larger.N, "D": larger.D} | lab.prediction(analysis, larger, runs)
    result = head | {"limited_by": plan.why, "train_tokens": tokens, "jobs": lab.jobs, "runs": runs, "fit": analysis.summary()}
    write(result | {"held_out": held | {"runs": []}})
    said = held["predicted"]
    print(
        f"held out: N = {larger.N:,}, D = {larger.D:,}: the law says {said['loss']:.4f} [{said['low']:.4f}, {said['high']:.4f}]"
    )
    result |= {"held_out": held | {"runs": lab.measure([larger], plan.seeds, "held out")}}
    write(result)
    return result


def main(argv: list[str]) -> None:
    if argv[:1] == ["worker"]:
        return serve(int(argv[1]))
    words, flags = configurator.split_positional(ScalingConfig(), argv)
    if words:
        raise UserError(f"{words[0]!r} is one argument too many: scale.py takes settings only, as --name=value")
    study = configurator.parse(ScalingConfig(), flags, __doc__)
    if study.quick:
        study = replace(study, levels=2, sizes=3, spread=4.0, held_out=2.0, bootstraps=min(study.bootstraps, 50))
    if find_spec("scipy") is None:
        raise UserError("scipy, which fits the law, is not installed: type pip install scipy")
    device = machine.pick_device(study.device)
    path = bench.results_dir(study, device) / f"scale{'.trial' if study.quick else ''}.json"
    folder = Path(study.keep)
    try:
        for needed in (path.parent, folder):
            needed.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"cannot write {e.filename}: {e.strerror}; type --out=another/folder --keep=another/folder") from None
    dataset = shards.open_dataset(Path(study.data_dir) / study.dataset)
    tokens = len(dataset.split("train"))
    family = Family(study, dataset.tokenizer.vocab_size, int(study.epochs * tokens))
    code = [hashlib.sha256(Path(__file__).with_name(name).read_bytes()).hexdigest() for name in DECIDES]
    keeper = RunCache(folder, {"data": dataset.sha256, "code": code, "torch": torch.__version__})
    jobs = study.jobs or (system.cores() if device.type == "cpu" else 1)
    head = bench.header("scale", study) | {"command": " ".join(["python scale.py", *argv])}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and so let go of the workers
    with workers(jobs, max(1, system.cores() // jobs)) as ask:
        lab = StudyRunner(family, device, keeper, ask, jobs)
        result = run_study(lab, head, tokens, lambda r: write_atomically(path, (json.dumps(r, indent=1) + "\n").encode()))
    print(as_text(result))
    print(
        f"wrote {path}"
        + ("; python -m report puts it into README.md and docs/" if path.parent.parent == Path("results") else "")
    )


if __name__ == "__main__":
    errors.entry(main)
