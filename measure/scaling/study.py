"""Scaling laws, measured on this machine: how the loss falls with parameters N and tokens D, and a check by prediction.

    python prepare_data.py shakespeare_char
    python bench.py scale                              a family of small GPTs, in twelve minutes
    python bench.py scale --minutes=60 --dataset=mine --tokens_per_parameter=20
    python bench.py scale --budgets=1e10,2e10,4e10     these budgets, in FLOPs of one run, however long they take
    python bench.py scale --quick                      a first look, in seconds

Each budget C is spent on models of several sizes; by C = 6ND a larger one sees fewer tokens. The law L = E + A/N^α + B/D^β is
fitted to all of them and predicts a larger run. The prediction is written to disk before that run is trained. Finished runs
are kept beside the results and not repeated: after Ctrl-C or a kill the same command resumes.

N is all parameters, embeddings included, as Chinchilla counts (Hoffmann et al. 2022): the token matrix is also the head and
multiplies each token. The models are so small that each has a core to itself; a compile would take longer than their training,
and on a CPU casts to bf16 cost such matmuls more than they save: hence eager, and there in float32 (LOG.md).
"""

import hashlib
import json
import math
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from tqdm import tqdm

from base import settings, system
from base.errors import UserError
from base.files import ROOT, read_text, sha256_of, write_atomically
from configurator import Config
from corpus import shards
from engine import machine
from measure import results
from measure.scaling.family import (
    EVAL_TOKENS,
    LEVEL,
    MIN_STEPS,
    SEEDS,
    WIDTHS,
    Family,
    Plan,
    Point,
    ScalingConfig,
    make_plan,
    round_down,
)
from measure.scaling.fit import Analysis, best_size
from measure.scaling.training import now, time_step, train_and_keep, workers
from report.stats import Estimate

# code that a kept run must have been made with
DECIDES = ("model.py", "optim.py", "data.py", "train.py", "engine/run.py")


@dataclass(frozen=True)
class RunCache:
    """Finished runs on disk, each under a name that follows from all that decides its loss."""

    folder: Path
    facts: dict  # besides the config: data, code, versions

    def path(self, what: str, value: dict) -> Path:
        known = {k: v for k, v in value.items() if k not in ("data_dir", "out_dir")}
        digest = hashlib.sha256(json.dumps([self.facts, known], sort_keys=True).encode()).hexdigest()
        return self.folder / f"{what}_{digest[:20]}.json"

    def read(self, path: Path) -> dict | None:
        try:
            return json.loads(read_text(path))
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            raise UserError(f"{path} is damaged: delete it") from None


@dataclass
class StudyRunner:
    """What a study is done with."""

    family: Family
    device: torch.device
    cache: RunCache
    pool: ProcessPoolExecutor
    jobs: int  # models trained at a time

    def train_all(self, points: list[Point], seeds: int, what: str) -> list[dict]:
        """Every point with every seed: a kept result, or a new one. The longest begin first."""
        todo = [(p, self.family.config(p, Config.seed + s, self.device)) for p in points for s in range(seeds)]
        paths = [self.cache.path("run", asdict(cfg)) for _, cfg in todo]
        results = {path: kept["result"] for path in paths if (kept := self.cache.read(path))}
        missing = {path: cfg for path, (_, cfg) in zip(paths, todo, strict=True) if path not in results}
        cost = {path: cfg.max_steps * (32 + cfg.n_embd) for path, cfg in missing.items()}
        form = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
        with tqdm(total=sum(cost.values()), desc=what, disable=None, bar_format=form) as bar:
            longest_first = sorted(missing, key=cost.get, reverse=True)
            asked = {self.pool.submit(train_and_keep, missing[path], path): path for path in longest_first}
            for future in as_completed(asked):
                result = results[asked[future]] = future.result()
                tqdm.write(
                    f"N = {result['N']:>9,}  D = {result['D']:>11,}  {result['seconds']:>7,.1f} s   loss {result['loss']:.4f}"
                )
                bar.update(cost[asked[future]])
        return [{"budget": p.budget} | results[path] for (p, _), path in zip(todo, paths, strict=True)]

    def plan(self) -> Plan:
        """The budgets that were given; or those that fit into the minutes: measured once and then kept, so that the same
        command resumes the same runs.
        """
        study, family = self.family.study, self.family
        if given := study.given_budgets():
            return Plan(given, study.seeds or SEEDS[0], "the command line")
        if study.quick:  # the least in which the largest model still makes enough steps
            least = round_down(6.9 * study.spread * family.params(WIDTHS[0]) * MIN_STEPS * study.tokens_per_step)
            return Plan([least * LEVEL**i for i in range(study.levels)], study.seeds or 1, "--quick")
        deciding = {k: v for k, v in asdict(study).items() if k not in ("bootstraps", "out", "keep")}
        path = self.cache.path("plan", deciding)
        if kept := self.cache.read(path):
            return Plan(**kept)
        widths = (8, 64) if self.device.type == "cpu" else (64, 512)
        points = [Point(0.0, w, family.params(w), MIN_STEPS * study.tokens_per_step) for w in widths]
        # all workers at once, as they will be
        times = list(self.pool.map(time_step, [family.config(p, 0, self.device) for p in points for _ in range(self.jobs)]))
        small, large = max(times[: self.jobs]), max(times[self.jobs :])
        slope = max(0.0, (large - small) / (points[1].N - points[0].N))

        def seconds(p: Point) -> float:
            step = small + slope * max(0, p.N - points[0].N)
            return step * (p.D + EVAL_TOKENS / 6) / study.tokens_per_step  # a forward pass is a third of a step, at most

        plan = make_plan(family, seconds, self.jobs)
        write_atomically(path, json.dumps(asdict(plan)).encode())
        return plan

    def prediction(self, analysis: Analysis, larger: Point, runs: list[dict]) -> dict:
        """What the law predicts for a larger run, kept with the time at which it was first predicted."""
        known = {"runs": runs, "bootstraps": len(analysis.laws), "larger": asdict(larger)}
        path = self.cache.path("prediction", known)
        kept = self.cache.read(path)
        if not kept:
            kept = {"predicted": analysis.predict(larger.N, larger.D), "predicted_at": now()}
            write_atomically(path, json.dumps(kept, indent=1).encode())
        return kept


def run_study(runner: StudyRunner, head: dict, tokens: int, write: Callable[[dict], None]) -> dict:
    """The whole study. write() is called with the result as soon as the prediction is made, and again at the end."""
    study, family, plan = runner.family.study, runner.family, runner.plan()
    levels = [family.level(c) for c in plan.budgets]
    if bad := next((c for c, level in zip(plan.budgets, levels, strict=True) if len(level) < 3), None):
        known = f"for {bad:g} FLOPs there are no three sizes between {MIN_STEPS} steps and {study.epochs:g} epochs"
        raise UserError(f"{known} of {study.dataset}: use other --budgets, or more --epochs")
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
    runs = runner.train_all([p for points in levels for p in points], plan.seeds, "training")
    analysis = Analysis(runs, study.bootstraps)
    C = study.held_out * plan.budgets[-1]
    best = best_size(analysis.law, C)
    larger = family.point(C, best) if 0 < best < math.inf else None
    if not larger:
        raise UserError(f"no run of {C:g} FLOPs to predict fits into {study.epochs:g} epochs: use a smaller --held_out")
    held = {"budget": C, "n_embd": larger.n_embd, "N": larger.N, "D": larger.D} | runner.prediction(analysis, larger, runs)
    result = head | {
        "limited_by": plan.why,
        "train_tokens": tokens,
        "jobs": runner.jobs,
        "runs": runs,
        "fit": analysis.summary(),
    }
    write(result | {"held_out": held | {"runs": []}})
    guess = Estimate(held["predicted"]["loss"], held["predicted"]["low"], held["predicted"]["high"])
    print(f"held out: N = {larger.N:,}, D = {larger.D:,}: the law predicts {guess.text('{:.4f}'.format)}")
    result |= {"held_out": held | {"runs": runner.train_all([larger], plan.seeds, "held out")}}
    write(result)
    return result


def command(argv: list[str]) -> tuple[Path, dict]:
    """python bench.py scale: (where the result was written, the result)."""
    words, flags = settings.split_positional(ScalingConfig(), argv)
    if words:
        raise UserError(f"{words[0]!r} is one argument too many: bench.py scale takes settings only, as --name=value")
    study = settings.parse(ScalingConfig(), flags, __doc__)
    if study.quick:
        study = replace(study, levels=2, sizes=3, spread=4.0, held_out=2.0, bootstraps=min(study.bootstraps, 50))
    if find_spec("scipy") is None:
        raise UserError("scipy, which fits the law, is not installed: run pip install scipy")
    device = machine.pick_device(study.device)
    path = results.results_dir(study.out, device) / f"scale{'.trial' if study.quick else ''}.json"
    folder = Path(study.keep) if study.keep else path.parent / "runs" / "scale"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"cannot write to {folder}: {e.strerror}; use --keep=another/folder") from None
    dataset = shards.open_dataset(Path(study.data_dir) / study.dataset)
    tokens = len(dataset.split("train"))
    family = Family(study, dataset.tokenizer.vocab_size, int(study.epochs * tokens))
    code = [sha256_of(ROOT / name) for name in DECIDES]
    cache = RunCache(folder, {"data": dataset.sha256, "code": code, "torch": torch.__version__})
    jobs = study.jobs or (system.cores() if device.type == "cpu" else 1)
    with workers(jobs, max(1, system.cores() // jobs)) as pool:
        runner = StudyRunner(family, device, cache, pool, jobs)
        head = results.header("scale", study)
        return path, run_study(runner, head, tokens, lambda result: results.write(path, result))
