"""Measure train.train_step itself, never a copy of it.

    python bench.py ladder             every rung of config/ladder/, each against the one before it and against the first
    python bench.py ablate             the top rung with one setting put back at a time
    python bench.py candidates         the top rung with one setting of CANDIDATES instead: what else might be faster here
    python bench.py verify             every setting against float64, on the same weights and batch
    python bench.py why [config.py]    where a step's time goes, beside its floor, and what to try next
    python bench.py compare A.json B.json --max_regression=3%
    python bench.py ab A.py B.py       two configs, paired and interleaved: tokens/s and loss with confidence intervals
    python bench.py sampling           tokens/s with and without the KV cache
    python bench.py decode [out/run]   tokens/s in each precision, beside the floor and transformers; a run's losses as well
    python bench.py stages             what each stage of config/stages/ reaches
    python bench.py shakespeare        what `make train` does, timed from a cold compiler cache: train, then sample
    python bench.py run config.py      one whole run: its losses, its evaluation, a text that it writes
    python bench.py start              from typing train.py to the first step done, with and without compiled code at hand
    python bench.py data               tokens/s of prepare_data.py beside tiktoken's own; a BPE learnt, timed and compared
    python bench.py safety             what it costs to be reproducible, and to save
    python bench.py kills              config/shakespeare.py killed at twenty random moments, against the same undisturbed

Each measurement is a fresh process. Rounds are interleaved (all configs, then all again), so that drift of a shared machine
hits all alike. Results go to results/<hardware>/<command>.json as raw numbers; report/ computes everything that is printed.
"""

import datetime
import glob
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

import configurator
from report.compare import compare as compare_results
from report.kinds import as_text
from base import errors, system
from base.errors import UserError
from base.files import write_atomically
from configurator import Config
from engine import machine
from engine.effective import effective, mismatches
from engine.run import build
from safety import prove

LADDER = "config/ladder/r[0-9][0-9]*.py"  # r01_x.py; r01b_y.py is its twin, beside the chain


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What to measure on; every command takes these."""

    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """where to measure"""
    batch_size: int = 0
    """micro-batch of the first rung; 0: 16 on a GPU, 4 on a CPU"""
    sequence_length: int = 0
    """T; 0: 1024 on a GPU, 256 on a CPU"""
    tokens_per_step: int = 0
    """tokens per optimizer step on every rung; 0: four micro-batches on a GPU, one on a CPU"""
    n_layer: int = 12
    """layers; 12 is GPT-2 124M, less is for trying things out"""
    rounds: int = 3
    """times that everything is measured"""
    steps: int = 8
    """steps from the same start whose losses are compared, in the first round"""
    quick: bool = False
    """one round of few steps on shorter sequences: a look, not a measurement"""
    data_dir: str = "data"
    """where prepared data sets lie"""
    out: str = "results"
    """folder for the results"""
    seeds: int = 5
    """ab: seeds per config"""
    max_regression: str = ""
    """compare: how much slower B may be than A, e.g. 3%; more ends with exit status 1"""

    def __post_init__(self):
        configurator.check_types(vars(self), BenchConfig)
        configurator.check_at_least(self, 1, "n_layer", "rounds", "steps", "seeds")
        configurator.check_at_least(self, 0, "batch_size", "sequence_length", "tokens_per_step")

    def by_device(self, device: torch.device) -> "BenchConfig":
        """The same with every 0 filled in."""
        gpu = device.type == "cuda"
        B = self.batch_size or (16 if gpu else 4)
        T = self.sequence_length or (1024 if gpu else 256) // (4 if self.quick else 1)
        few = dict(rounds=1, steps=min(self.steps, 4)) if self.quick else {}
        tokens = self.tokens_per_step or B * T * (4 if gpu else 1)
        return replace(self, batch_size=B, sequence_length=T, tokens_per_step=tokens, **few)

    def apply(self, cfg: Config, base_batch_size: int) -> Config:
        """cfg at these sizes; its micro-batch keeps its ratio to the first rung's."""
        return replace(
            cfg,
            device=self.device,
            n_layer=self.n_layer,
            batch_size=max(1, cfg.batch_size * self.batch_size // base_batch_size),
            sequence_length=self.sequence_length,
            tokens_per_step=self.tokens_per_step,
            data_dir=self.data_dir,
        )


# ---- timing -----------------------------------------------------------------------------------------------------------


def time_steps(
    do_step: Callable[[int], Any],
    steps: int,
    min_timed: int,
    clock: Callable[[], float] = time.perf_counter,
    settled: float = 0.1,
    max_warmup: int = 5,
    min_seconds: float = 0.0,
) -> tuple[list[float], int]:
    """Run do_step(0), do_step(1), …: (seconds of each step, how many of the first are warm-up).

    do_step must not return before its work is done. Warm-up ends when a step takes within `settled` of the one before it,
    or after max_warmup steps; the first step, which compiles, never counts. At least `steps` steps run, and at least
    min_timed and min_seconds after the warm-up.
    """
    seconds: list[float] = []
    warmup = 0
    while len(seconds) < max(steps, warmup + min_timed) or sum(seconds[warmup:]) < min_seconds:
        began = clock()
        do_step(len(seconds))
        seconds.append(clock() - began)
        n = len(seconds)
        if n == warmup + 1 and n <= max_warmup:  # still warming up: does this step settle it?
            calm = n >= 3 and abs(seconds[-1] - seconds[-2]) <= settled * seconds[-2]
            warmup = n - 1 if calm else n
    return seconds, min(warmup, len(seconds) - 1)


def measure(cfg: Config, steps: int, min_timed: int) -> dict:
    """Build a run, time its steps, read back what was on. A plain dict, with an "error" if that is not what was asked."""
    import train

    run = build(cfg)
    losses: list[float] = []

    def one_step(step: int) -> None:
        losses.append(train.train_step(run, step).loss)
        machine.synchronize(run.device)

    # A GPU's clocks take seconds to settle; a CPU's steps are seconds.
    min_seconds = 2.0 if run.device.type == "cuda" else 0.0
    try:
        seconds, warmup = time_steps(one_step, steps, min_timed, min_seconds=min_seconds)
        memory = machine.memory_gib(run.device)
        on = effective(run)
    except RuntimeError as e:
        if not errors.is_out_of_memory(e):
            raise
        return {"error": f"out of memory: {str(e).splitlines()[0]}", "out_of_memory": True}
    wrong = mismatches(run, on)
    if on["micro_batch"] != cfg.split_step(run.world.size)[0]:  # a step that was cut smaller is another measurement
        return {"error": f"out of memory: only micro-batches of {on['micro_batch']} fit", "out_of_memory": True}
    result = {
        "requested": asdict(run.cfg),
        "effective": on,
        "first_step_s": seconds[0],
        "warmup": warmup,
        "step_s": seconds,
        "losses": losses,
        "memory_gib": memory,
        "machine": machine.describe(run.device),
        "peak_flops": machine.peak_flops(run.device),
    }
    run.close()
    return result | ({"error": "; ".join(wrong)} if wrong else {})


def ceilings(cfg: Config) -> dict:
    """What this machine reaches in its own large matmuls (FLOP/s, per dtype) and in a large copy (bytes/s, read + written)."""
    device = machine.pick_device(cfg.device)
    n, repeats = (8192, 20) if device.type == "cuda" else (1536, 6)

    def best(work: Callable[[], Any]) -> float:
        return machine.best_seconds(device, work, repeats)

    rates: dict[str, Any] = {"peak_flops": machine.peak_flops(device), "machine": machine.describe(device)}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))  # random: zeros run faster than data
        rates[f"gemm_{str(dtype).removeprefix('torch.')}_flops"] = 2 * n**3 / best(lambda a=a, b=b: a @ b)
    if device.type == "cuda":
        before = torch.backends.cuda.matmul.fp32_precision
        machine.set_fp32_precision("tf32", device)
        a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
        rates["gemm_tf32_flops"] = 2 * n**3 / best(lambda: a @ b)
        torch.backends.cuda.matmul.fp32_precision = before
    big = torch.randn(2**28 if device.type == "cuda" else 2**25, device=device)
    other = torch.empty_like(big)
    rates["copy_bytes_per_s"] = 2 * big.nbytes / best(lambda: other.copy_(big))
    return rates


def worker(job_path: str, result_path: str) -> None:
    """A fresh process's whole life: do one job, leave its result as JSON (from the first process, if there are several)."""
    from measure import verify, why

    job = json.loads(Path(job_path).read_text(encoding="utf-8"))
    cfg = Config(**job["config"])
    try:
        if job["what"] == "ceilings":
            result = ceilings(cfg)
        elif job["what"] == "why":
            result = why.why(cfg, job["ceilings"], Path(job["trace"]))
        elif job["what"] == "verify":
            result = verify.verify(cfg.data_dir, machine.pick_device(cfg.device), job["small"])
        else:
            result = measure(cfg, job["steps"], job["min_timed"])
    except UserError as e:
        result = {"error": str(e)}
    if int(os.environ.get("RANK", 0)) == 0 or "error" in result:
        Path(result_path).write_text(json.dumps(result), encoding="utf-8")
    if "error" in result:
        sys.exit(1)  # and torchrun ends the processes that would wait for this one


def in_fresh_process(cfg: Config, what: str = "measure", **job: Any) -> dict:
    """Do a job in a process of its own (in cfg.processes of them, under torchrun). A crash comes back as its "error"."""
    with tempfile.TemporaryDirectory() as folder:
        task, result = Path(folder, "job.json"), Path(folder, "result.json")
        task.write_text(json.dumps({"what": what, "config": asdict(cfg)} | job), encoding="utf-8")
        start = [sys.executable]
        if cfg.processes > 1 and what != "ceilings":
            start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={cfg.processes}"]
        done = subprocess.run(
            [*start, __file__, "worker", task, result], capture_output=True, encoding="utf-8", errors="replace"
        )
        if result.is_file():
            return json.loads(result.read_text(encoding="utf-8"))
        # torchrun's own last words are a frame of "=": what a process said stands before, how it ended inside
        lines = [line for line in done.stderr.splitlines() if re.search(r"[A-Za-z]", line)] or ["no message"]
        errors = [line for line in lines if re.search(r"(Error|Exception): ", line) and "ChildFailedError" not in line]
        said = (errors or lines)[-1]
        inner = re.findall(r"exitcode *: (-?\d+)", done.stderr)
        code = int(inner[0]) if inner else done.returncode
        # the kernel's answer to a process that outgrows memory is SIGKILL
        return {"error": f"process ended with {code}: {said.strip()}", "out_of_memory": code in (-9, 137)}


# ---- ladder and ablation ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rung:
    """One config to measure, and the one it is compared with."""

    name: str
    title: str
    cfg: Config
    versus: str  # the rung it changes one setting of; its own name in the first
    changes: dict[str, tuple[Any, Any]]  # that setting, {field: (there, here)}

    @property
    def twin(self) -> bool:
        """r01b_… stands beside r01_…: another device's form of it, on which no later rung builds."""
        return re.match(r"r\d\d[a-z]", self.name) is not None


def title_of(path: str) -> str:
    """The first line of a config file's docstring."""
    return re.search(r'"""(.*?)(\n|""")', Path(path).read_text(encoding="utf-8"))[1].strip()


def load_ladder() -> list[Rung]:
    """The rungs of config/ladder/ in order, each with the rung it changes; a twin behind the rung it stands beside."""
    rungs: list[Rung] = []
    parent = None  # the chain's last rung
    for path in sorted(glob.glob(LADDER)):
        rung = Rung(Path(path).stem, title_of(path), configurator.load_file(path), "", {})
        below = next(r for r in rungs if r.name == rungs[-1].versus) if rung.twin else parent
        changes = configurator.diff(below.cfg, rung.cfg) if below else {}
        if below and len(changes) != 1:
            raise UserError(f"{path} must change exactly one setting of {below.name}, not {', '.join(changes) or 'none'}")
        rungs.append(replace(rung, versus=below.name if below else rung.name, changes=changes))
        parent = parent if rung.twin else rungs[-1]
    if not rungs:
        raise UserError(f"there is no {LADDER} here: type cd {Path(__file__).parent} first")
    return rungs


def cannot_be_had(cfg: Config, device: torch.device) -> str | None:
    """Why a config does not exist on this machine, or None. What only a run can tell, measure() tells."""
    if reason := machine.not_available(cfg, device):
        return reason
    if cfg.attention == "blocked" and device.type != "cpu":
        return "a flash kernel leaves out the scores above the diagonal already"
    there = torch.cuda.device_count() if device.type == "cuda" else system.cores()
    if cfg.processes > there:
        return f"it needs {cfg.processes} {'GPUs' if device.type == 'cuda' else 'cores'}, there is {there}"
    if cfg.batch_size > cfg.tokens_per_step // cfg.T:
        return f"a step of {cfg.tokens_per_step} tokens is one micro-batch already: give a larger --tokens_per_step"
    return None


def climb(rungs: list[Rung], sizes: BenchConfig, device: torch.device) -> tuple[list[Rung], dict[str, str]]:
    """The rungs at the given sizes, each with one setting more than the last that this machine can have, and
    {name: reason} of those it cannot: their setting is left out of all later rungs.
    """
    base = rungs[0].cfg.batch_size
    standing = replace(rungs[0], cfg=sizes.apply(rungs[0].cfg, base))  # the last rung of the chain that can be had
    climbed, skipped, before = [standing], {}, standing
    for rung in rungs[1:]:
        ((field, (_, value)),) = rung.changes.items()
        if field == "batch_size":
            value = max(1, value * sizes.batch_size // base)
        below = before if rung.twin else standing
        cfg = replace(below.cfg, **{field: value})
        here = Rung(rung.name, rung.title, cfg, below.name, configurator.diff(below.cfg, cfg))
        climbed.append(here)
        reason = cannot_be_had(cfg, device)
        if not reason and field == "fp32_precision":
            # whether this device really rounds shows only when it multiplies: one step of one layer
            reason = in_fresh_process(replace(cfg, n_layer=1), steps=1, min_timed=1).get("error")
        if reason:
            skipped[rung.name] = reason
        if not rung.twin:
            before = standing
            standing = standing if reason else here
    return climbed, skipped


def run_rounds(
    rungs: list[Rung], skipped: dict[str, str], sizes: BenchConfig, min_timed: int, halve: bool = True
) -> dict[str, list[dict]]:
    """Measure every rung `rounds` times, interleaved. {name: [result, …]}; a rung that fails is added to `skipped`. Running out
    of memory is a failure like others, or with `halve` OutOfMemory.
    """
    results: dict[str, list[dict]] = {rung.name: [] for rung in rungs}
    with tqdm(total=sizes.rounds * (len(rungs) - len(skipped)), disable=None, unit="run") as bar:
        for number in range(sizes.rounds):
            for rung in rungs:
                if rung.name in skipped:
                    continue
                bar.set_description(f"round {number + 1}/{sizes.rounds} {rung.name}")
                steps = sizes.steps if number == 0 else 1
                result = in_fresh_process(rung.cfg, steps=steps, min_timed=min_timed)
                bar.update()
                if result.get("out_of_memory") and halve:
                    raise OutOfMemory(f"{rung.name}: {result['error']}")
                if "error" in result:
                    skipped[rung.name] = result["error"]
                    bar.total -= sizes.rounds - number - 1
                    continue
                results[rung.name].append(result)
    return results


class OutOfMemory(Exception):
    """A rung needed more memory than there is."""


def with_smaller_batches(sizes: BenchConfig, attempt: Callable[[BenchConfig], dict]) -> dict:
    """attempt(sizes), and again with half the micro-batch for all rungs whenever one runs out of memory."""
    while True:
        try:
            return attempt(sizes)
        except OutOfMemory as e:
            if sizes.batch_size == 1:
                raise UserError(f"out of memory even with micro-batches of 1: {e}; type --sequence_length=…") from None
            sizes = replace(sizes, batch_size=sizes.batch_size // 2)
            print(f"{e}\nout of memory: every rung again with micro-batches of {sizes.batch_size}", file=sys.stderr)


def ladder(sizes: BenchConfig, device: torch.device) -> dict:
    """Every rung that this machine can have."""
    rungs, skipped = climb(load_ladder(), sizes, device)
    results = run_rounds(rungs, skipped, sizes, min_timed=2)
    return record("ladder", sizes, rungs, skipped, results)


def top_rung(climbed: list[Rung], skipped: dict[str, str]) -> Rung:
    """The highest rung of the chain that can be had in one process: processes on one machine may share what one would use."""
    return next(r for r in reversed(climbed) if r.name not in skipped and not r.twin and r.cfg.processes <= 1)


def ablate(sizes: BenchConfig, device: torch.device) -> dict:
    """The top rung, and it with one setting put back at a time."""
    climbed, skipped = climb(load_ladder(), sizes, device)
    chain = {r.name: r for r in climbed if r.name not in skipped and not r.twin}
    top = top_rung(climbed, skipped)
    rungs = [Rung("top", "the top rung", top.cfg, "top", {})]
    rung = top
    while rung.changes:  # down the chain; a twin is never met
        ((field, (before, _)),) = rung.changes.items()
        if field != "fp32_precision" or top.cfg.dtype == "float32":  # else no float32 matmul is left for it to act on
            cfg = replace(top.cfg, **{field: before})
            changes = {field: (getattr(top.cfg, field), before)}  # a later rung may have changed it again
            rungs.insert(1, Rung(f"without_{rung.name}", rung.title, cfg, "top", changes))
        rung = chain[rung.versus]
    skipped = {}
    return record("ablate", sizes, rungs, skipped, run_rounds(rungs, skipped, sizes, min_timed=3))


# What may be faster than the top rung on some machine: each alone, in its place. Micro-batches times the top rung's own.
CANDIDATES: dict[str, tuple] = {
    "batch_size": (0.25, 0.5, 2, 4),
    "attention": ("naive", "sdpa"),
    "sdpa_backend": ("flash", "cudnn", "efficient"),
    "compile_mode": ("max-autotune-no-cudagraphs", "reduce-overhead"),
    "compile_scope": ("block",),
    "vocab_multiple": (64, 256),
}


def candidates(sizes: BenchConfig, device: torch.device) -> dict:
    """The top rung, at four of its micro-batches per step, and it with one setting of CANDIDATES at a time."""
    sizes = replace(sizes, tokens_per_step=max(sizes.tokens_per_step, 4 * sizes.batch_size * sizes.sequence_length))
    top = top_rung(*climb(load_ladder(), sizes, device)).cfg
    rungs, skipped = [Rung("top", "the top rung", top, "top", {})], {}
    for field, values in CANDIDATES.items():
        for value in values:
            value = max(1, int(top.batch_size * value)) if field == "batch_size" else value
            cfg = replace(top, **{field: value})
            if cfg == top:
                continue
            rung = Rung(f"{field}={value}", field, cfg, "top", {field: (getattr(top, field), value)})
            rungs.append(rung)
            if reason := cannot_be_had(cfg, device):
                skipped[rung.name] = reason
    results = run_rounds(rungs, skipped, sizes, min_timed=3, halve=False)
    return record("candidates", sizes, rungs, skipped, results)


def record(kind: str, sizes: BenchConfig, rungs: list[Rung], skipped: dict[str, str], results: dict[str, list[dict]]) -> dict:
    """Everything measured, as JSON values; UserError if that is nothing."""
    if all(rung.name in skipped for rung in rungs):
        raise UserError(f"nothing could be measured: {next(iter(skipped.values()))}")
    entries = []
    for rung in rungs:
        rounds = results[rung.name]
        entry = {"name": rung.name, "title": rung.title, "versus": rung.versus}
        entry["changes"] = {k: list(v) for k, v in rung.changes.items()}
        if rung.name in skipped:
            entries.append(entry | {"skipped": skipped[rung.name]})
            continue
        entries.append(
            entry
            | {key: rounds[0][key] for key in ("requested", "effective", "losses")}
            | {"memory_gib": max(r["memory_gib"] for r in rounds), "first_step_s": [r["first_step_s"] for r in rounds]}
            | {"warmup_s": [r["step_s"][: r["warmup"]] for r in rounds]}
            | {"step_s": [r["step_s"][r["warmup"] :] for r in rounds]}
        )
    return header(kind, sizes) | {"ceilings": in_fresh_process(rungs[0].cfg, "ceilings"), "rungs": entries}


def header(kind: str, sizes: BenchConfig) -> dict:
    """What every result file begins with."""
    device = machine.pick_device(sizes.device)
    when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    command = "python bench.py " + " ".join(sys.argv[1:])
    return {"kind": kind, "date": when, "command": command, "machine": machine.describe(device), "sizes": asdict(sizes)}


# ---- two configs ------------------------------------------------------------------------------------------------------


def given_sizes(asked: BenchConfig) -> dict[str, Any]:
    """The settings that were typed, for a config file that is to be measured as it is otherwise."""
    given: dict[str, Any] = {k: v for k in ("batch_size", "sequence_length", "tokens_per_step") if (v := getattr(asked, k))}
    if "sequence_length" in given and "batch_size" in given:
        given.setdefault("tokens_per_step", given["sequence_length"] * given["batch_size"])
    if asked.device != "auto":
        given["device"] = asked.device
    if asked.n_layer != BenchConfig.n_layer:
        given["n_layer"] = asked.n_layer
    return given | {"data_dir": asked.data_dir}


def ab(paths: list[str], sizes: BenchConfig, device: torch.device) -> dict:
    """Two config files as they are (sizes only where given), seed by seed, in alternating order."""
    if len(paths) != 2:
        raise UserError("ab compares two config files: type python bench.py ab A.py B.py")
    given = given_sizes(sizes)
    pair = [(p, replace(configurator.load_file(p), **given)) for p in paths]
    runs: list[list[dict]] = [[], []]
    with tqdm(total=2 * sizes.seeds, disable=None, unit="run") as bar:
        for seed in range(sizes.seeds):
            for which in (0, 1) if seed % 2 == 0 else (1, 0):
                path, cfg = pair[which]
                bar.set_description(f"seed {seed + 1}/{sizes.seeds} {Path(path).stem}")
                result = in_fresh_process(replace(cfg, seed=cfg.seed + seed), steps=sizes.steps, min_timed=3)
                bar.update()
                if "error" in result:
                    raise UserError(f"{path}: {result['error']}")
                runs[which].append(result)
    sides = [
        {
            "config": path,
            "requested": side[0]["requested"],
            "effective": side[0]["effective"],
            "step_s": [r["step_s"][r["warmup"] :] for r in side],
            "losses": [r["losses"] for r in side],
        }
        for (path, _), side in zip(pair, runs, strict=True)
    ]
    changes = {k: list(v) for k, v in configurator.diff(pair[0][1], pair[1][1]).items() if k != "out_dir"}
    return header("ab", sizes) | {"sides": sides, "changes": changes}


# ---- sampling and stages ----------------------------------------------------------------------------------------------


def sampling(sizes: BenchConfig, device: torch.device) -> dict:
    """Decode 124M with random weights, cached and uncached in turn: a token's cost does not depend on the weights."""
    from model import GPT
    from sample import generate

    torch.manual_seed(0)
    model = GPT(Config(n_layer=sizes.n_layer)).to(device).eval()
    prompt, count = list(range(64)), 8 if sizes.quick else 48
    speeds: dict[str, list[float]] = {"cached": [], "uncached": []}
    tokens: dict[str, list[int]] = {}
    for number in tqdm(range(1 + sizes.rounds), desc="sampling", disable=None):
        for how in speeds:
            times = []
            ids = []
            began = time.perf_counter()
            for token in generate(model, prompt, count, temperature=0, kv_cache=how == "cached"):
                ids.append(token.item())
                times.append(time.perf_counter() - began)
                began = time.perf_counter()
            tokens[how] = ids
            if number:  # the first round warms up; the first token reads the prompt
                speeds[how].append((count - 1) / sum(times[1:]))
    same = tokens["cached"] == tokens["uncached"]
    return header("sampling", sizes) | {"prompt_tokens": 64, "new_tokens": count, "tokens_per_s": speeds, "same_tokens": same}


def decode(paths: list[str], sizes: BenchConfig, device: torch.device) -> dict:
    """decoding.py on GPT-2 124M with random weights, or on a model."""
    from measure import decoding

    if len(paths) > 1:
        raise UserError(f"{paths[1]!r} is one argument too many: type python bench.py decode [out/run]")
    return header("decode", sizes) | decoding.measure(*paths or [""], sizes, device)


def residual_stream(cfg: Config) -> list[float]:
    """Standard deviation of the residual stream at init: behind the embedding, then behind each block."""
    from corpus.shards import open_dataset
    from model import GPT

    torch.manual_seed(cfg.seed)
    model, found = GPT(cfg).eval(), []
    model.transformer.h[0].register_forward_pre_hook(lambda _, args: found.append(args[0].std().item()))
    for block in model.transformer.h:
        block.register_forward_hook(lambda *args: found.append(args[2].std().item()))
    tokens = open_dataset(Path(cfg.data_dir) / cfg.dataset).split("train").read(0, 4 * 256)
    with torch.no_grad():
        model(torch.from_numpy(tokens).view(4, 256))
    return found


def stages(sizes: BenchConfig, device: torch.device) -> dict:
    """Run each training stage's config as a user would, and measure the residual stream of the last one."""
    entries = []
    for path in tqdm(sorted(glob.glob("config/stages/s[2-9]_*.py")), desc="stages", disable=None):
        with tempfile.TemporaryDirectory() as folder:
            flags = [f"--out_dir={folder}/run", f"--device={sizes.device}", f"--data_dir={sizes.data_dir}"]
            done = subprocess.run([sys.executable, "train.py", path, *flags], capture_output=True, encoding="utf-8")
            if done.returncode:
                raise UserError(f"{path}: {done.stderr.strip().splitlines()[-1]}")
            records = [json.loads(line) for line in Path(folder, "run", "log.jsonl").read_text(encoding="utf-8").splitlines()]
        on = next(r["effective"] for r in records if "effective" in r)
        losses = [r["loss"] for r in records if "loss" in r]
        val = [r["val_loss"] for r in records if "val_loss" in r]
        seconds = sum(r["ms"] for r in records if "ms" in r) / 1e3
        entries.append(
            {"config": path, "title": title_of(path), "parameters": on["parameters"], "dtype": on["dtype"], "seconds": seconds}
            | {"losses": losses, "val_loss": val[-1]}
        )
    last = configurator.load_file(sorted(glob.glob("config/stages/s5_*.py"))[0])
    last = replace(last, data_dir=sizes.data_dir)
    streams = {
        "scaled": residual_stream(last),
        "unscaled": residual_stream(replace(last, scale_residual_init=False)),
    }
    return header("stages", sizes) | {"ln_vocab_size": math.log(50257), "stages": entries, "residual_std": streams}


def shakespeare(sizes: BenchConfig, device: torch.device) -> dict:
    """The main job as `make train` runs it, from an empty compiler cache; installing and downloading come before it."""
    prompt = "ROMEO:"
    with tempfile.TemporaryDirectory() as folder:
        out, env = f"{folder}/shakespeare", os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/cache"}
        places = [f"--out_dir={out}", f"--data_dir={sizes.data_dir}", f"--device={sizes.device}"]
        torchrun = [sys.executable, "-m", "torch.distributed.run"]
        train = [*torchrun, "train.py", "config/shakespeare.py", *places, *(["--max_steps=4"] if sizes.quick else [])]
        sample = [sys.executable, "sample.py", out, f"--prompt={prompt}", f"--device={sizes.device}"]
        seconds, texts = {}, {}
        for name, command in {"train": train, "sample": sample}.items():
            began = time.perf_counter()
            done = subprocess.run(command, capture_output=True, encoding="utf-8", env=env)
            seconds[name], texts[name] = time.perf_counter() - began, done.stdout
            if done.returncode:
                raise UserError(f"{' '.join(command[2:])}: {done.stderr.strip().splitlines()[-1]}")
        records = [json.loads(line) for line in Path(out, "log.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [r for r in records if "loss" in r]
    return header("shakespeare", sizes) | {
        "seconds": seconds,
        "first_step_s": steps[0]["ms"] / 1e3,
        "step_s": [[r["ms"] / 1e3 for r in steps[1:]]],
        "losses": [r["loss"] for r in steps],
        "val_loss": next(r["val_loss"] for r in reversed(records) if "val_loss" in r),
        "parameters": next(r["effective"]["parameters"] for r in records if "effective" in r),
        "requested": next(r["config"] for r in records if "config" in r),
        "sample": texts["sample"],
    }


def start(sizes: BenchConfig, device: torch.device) -> dict:
    """Seconds from starting train.py until its first step is done: with an empty compiler cache, and with what that left."""
    seconds: dict[str, dict[str, list[float]]] = {}
    for _ in tqdm(range(sizes.rounds), desc="start", disable=None):
        for scope in ("block", "model"):
            kept = seconds.setdefault(scope, {"first": [], "second": []})
            with tempfile.TemporaryDirectory() as folder:
                flags = [f"--out_dir={folder}/run", f"--data_dir={sizes.data_dir}", f"--device={sizes.device}", "--max_steps=2"]
                flags += [f"--compile_scope={scope}", "--compile=True", "--eval_tokens=64"]
                env = {k: v for k, v in os.environ.items() if k != "TORCHINDUCTOR_CACHE_DIR"}
                env |= {"PYTHONUNBUFFERED": "1", "XDG_CACHE_HOME": folder}
                for which in kept:
                    began, took = time.perf_counter(), None
                    command = [sys.executable, "train.py", "config/shakespeare.py", *flags]
                    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8", env=env) as process:
                        for line in process.stdout:
                            if took is None and line.startswith("step"):
                                took = time.perf_counter() - began
                    if process.returncode or took is None:
                        raise UserError(f"{' '.join(command[1:])} ended with {process.returncode}")
                    kept[which].append(took)
    return header("start", sizes) | {"config": "config/shakespeare.py", "seconds": seconds}


def whole_run(paths: list[str], sizes: BenchConfig) -> dict:
    """Train a config from its first step to its last, evaluate it, let it write."""
    if len(paths) != 1:
        raise UserError("one whole run of what? type python bench.py run config/enwik8.py")
    places = [f"--data_dir={sizes.data_dir}", f"--device={sizes.device}"]
    Path("out").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir="out") as folder:
        out, texts, seconds = f"{folder}/run", {}, {}
        commands = {
            "train": ["train.py", *paths, *places, f"--out_dir={out}", *(["--max_steps=4"] if sizes.quick else [])],
            "evaluate": ["evaluate.py", out, *places, f"--out={folder}/evaluation.json"],
            "sample": ["sample.py", out, "--max_new_tokens=150", "--temperature=0.8", places[1]],
        }
        for name, command in commands.items():
            began = time.perf_counter()
            done = subprocess.run([sys.executable, *command], capture_output=True, encoding="utf-8")
            seconds[name], texts[name] = time.perf_counter() - began, done.stdout
            if done.returncode:
                raise UserError(f"{' '.join(command)}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
        records = [json.loads(line) for line in Path(out, "log.jsonl").read_text(encoding="utf-8").splitlines()]
        evaluation = json.loads(Path(folder, "evaluation.json").read_text(encoding="utf-8"))
    steps = [r for r in records if "loss" in r]
    return header("run", sizes) | {
        "config": paths[0],
        "requested": next(r["config"] for r in records if "config" in r),
        "parameters": next(r["effective"]["parameters"] for r in records if "effective" in r),
        "seconds": seconds,
        "losses": [round(r["loss"], 4) for r in steps],
        "val_losses": {str(r["step"]): r["val_loss"] for r in records if "val_loss" in r},
        "tokens_per_s": statistics.median(r["tokens_per_s"] for r in steps[1:]),
        "evaluation": evaluation,
        "sample": texts["sample"],
    }


def data(sizes: BenchConfig, device: torch.device) -> dict:
    """preparing.py on enwik8, or with --quick on tiny Shakespeare."""
    import prepare_data
    from corpus.sources import NAMED
    from measure import preparing

    path = prepare_data.local_copy(NAMED["shakespeare" if sizes.quick else "enwik8"][1], sizes.data_dir)
    return header("data", sizes) | preparing.measure(path, rounds=sizes.rounds)


def safety(sizes: BenchConfig, device: torch.device) -> dict:
    """Step time with and without deterministic kernels; what a save holds up, in the foreground and in the background."""
    cfg = replace(configurator.load_file("config/shakespeare.py"), device=sizes.device, data_dir=sizes.data_dir)
    kernels: dict[str, list[list[float]]] = {"deterministic": [], "any": []}
    saving: dict[str, list[dict]] = {"background": [], "foreground": []}
    few, steps = (1, 12) if sizes.quick else (sizes.rounds, 48)
    for _ in tqdm(range(few), desc="safety", disable=None):
        for name, rounds in kernels.items():
            found = in_fresh_process(replace(cfg, deterministic=name == "deterministic"), steps=steps, min_timed=steps // 2)
            if "error" in found:
                raise UserError(found["error"])
            rounds.append(found["step_s"][found["warmup"] :])
        for name, runs in saving.items():
            with tempfile.TemporaryDirectory(dir="out") as folder:
                flags = [f"--out_dir={folder}/run", f"--device={sizes.device}", f"--data_dir={sizes.data_dir}"]
                flags += [f"--max_steps={steps}", f"--checkpoint_interval={steps // 3}", "--keep_best=False"]
                flags += [f"--background_save={name == 'background'}", f"--eval_tokens={cfg.T}"]
                command = [sys.executable, "train.py", "config/shakespeare.py", *flags]
                done = subprocess.run(command, capture_output=True, encoding="utf-8")
                if done.returncode:
                    raise UserError(f"{' '.join(command[1:])}: {done.stderr.strip().splitlines()[-1]}")
                lines = Path(folder, "run", "log.jsonl").read_text(encoding="utf-8").splitlines()
                runs.append(saves_in([json.loads(line) for line in lines]))
    return header("safety", sizes) | {"kernels_s": kernels, "saving": saving, "requested": asdict(cfg)}


def saves_in(records: list[dict]) -> dict:
    """Of a run's log: what each save held up (the last, which everything waits for, left out), what it took, and all steps."""
    saves = [r["step_done"] for r in records if r.get("event") == "saving"][:-1]
    return {
        "after_steps": saves,
        "pause_ms": [r["pause_ms"] for r in records if r.get("event") == "saving" and r["step_done"] in saves],
        "save_ms": [r["save_ms"] for r in records if r.get("event") == "saved" and r["step_done"] in saves],
        "step_ms": [r["ms"] for r in records if "ms" in r],
    }


def kills(sizes: BenchConfig, device: torch.device) -> dict:
    """The run of config/shakespeare.py, killed again and again, ends in the same bits as the undisturbed one."""
    Path("out").mkdir(exist_ok=True)
    cfg = replace(configurator.load_file("config/shakespeare.py"), device=sizes.device, data_dir=sizes.data_dir)
    cfg = replace(cfg, checkpoint_interval=20, max_steps=60 if sizes.quick else cfg.max_steps)
    with tempfile.TemporaryDirectory(dir="out") as folder:
        return header("kills", sizes) | prove.prove_kills(replace(cfg, out_dir=folder), kills=2 if sizes.quick else 20)


# ---- proof and explanation --------------------------------------------------------------------------------------------


def verify(sizes: BenchConfig, device: torch.device) -> dict:
    """Every toggle against float64; the small model with --quick."""
    cfg = replace(load_ladder()[0].cfg, device=device.type, data_dir=sizes.data_dir)
    result = in_fresh_process(cfg, "verify", small=sizes.quick)
    if "error" in result:
        raise UserError(result["error"])
    return header("verify", sizes) | result


def why(paths: list[str], asked: BenchConfig, device: torch.device) -> dict:
    """One profiled step beside its floor: of a config as it is, or of the top rung at the ladder's sizes."""
    sizes = asked.by_device(device)
    if len(paths) > 1:
        raise UserError(f"{paths[1]!r} is one argument too many: type python bench.py why [config.py]")
    if paths:
        name, cfg = paths[0], replace(configurator.load_file(paths[0]), **given_sizes(asked))
    else:
        top = top_rung(*climb(load_ladder(), sizes, device))
        name, cfg = top.name, top.cfg
    trace = Path("out", f"why_{Path(name).stem}.trace.json").resolve()
    trace.parent.mkdir(parents=True, exist_ok=True)
    rates = in_fresh_process(cfg, "ceilings")
    result = in_fresh_process(cfg, "why", ceilings=rates, trace=str(trace))
    if error := rates.get("error") or result.get("error"):
        raise UserError(f"{name}: {error}")
    print(f"wrote {trace} (open it in chrome://tracing or ui.perfetto.dev)")
    place = {"trace": f"out/{trace.name}"}  # where it lies on another machine is nobody's business
    return header("why", sizes) | {"config": name, "requested": asdict(cfg), "ceilings": rates} | result | place


def compare(paths: list[str], asked: BenchConfig) -> None:
    """Two result files; exit status 1 if B is slower than A by more than --max_regression."""
    if len(paths) != 2:
        raise UserError("compare takes two result files: type python bench.py compare A.json B.json")
    try:
        limit = float(asked.max_regression.removesuffix("%")) / 100 if asked.max_regression else None
    except ValueError:
        raise UserError(f"max_regression={asked.max_regression!r} is no percentage: type --max_regression=3%") from None
    try:
        a, b = (json.loads(Path(p).read_text(encoding="utf-8")) for p in paths)
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read a result: {e}") from None
    text, failed = compare_results(a, b, limit)
    print(text)
    if failed:
        sys.exit(1)


# ---- the command line -------------------------------------------------------------------------------------------------

MEASURES = {
    "ladder": ladder,
    "ablate": ablate,
    "candidates": candidates,
    "verify": verify,
    "sampling": sampling,
    "stages": stages,
    "shakespeare": shakespeare,
    "start": start,
    "data": data,
    "safety": safety,
    "kills": kills,
}
COMMANDS = [*MEASURES, "run", "decode", "why", "ab", "compare"]


def results_dir(sizes: BenchConfig, device: torch.device) -> Path:
    """results/<hardware>, e.g. results/nvidia-h200 or results/amd-epyc-2-cores."""
    slug = re.sub(r"[^a-z0-9]+", "-", machine.hardware_name(device).lower()).strip("-")
    return Path(sizes.out) / slug


def main(argv: list[str]) -> None:
    if argv[:1] == ["worker"]:
        return worker(*argv[1:])
    words, flags = configurator.split_positional(BenchConfig(), argv)
    asked = configurator.parse(BenchConfig(), flags, __doc__)
    command, places = (words[0], words[1:]) if words else ("", [])
    if command not in COMMANDS:
        raise UserError(f"{command!r} is no command: type python bench.py {' | '.join(COMMANDS)}")
    if command == "compare":
        return compare(places, asked)
    if places and command in MEASURES:
        raise UserError(f"{places[0]!r} is one argument too many: bench.py {command} takes settings only, as --name=value")
    device = machine.pick_device(asked.device)
    sizes = asked.by_device(device)
    # a look must not replace a measurement
    trial = ".trial" if sizes.quick or sizes.n_layer != BenchConfig.n_layer else ""
    of = "".join(f"_{Path(p).stem}" for p in places) if command in ("run", "ab", "decode") else ""  # each its own file
    of += f"_T{asked.sequence_length}" if command == "ab" and asked.sequence_length else ""
    path = results_dir(sizes, device) / f"{command}{of}{trial}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # known before anything is measured
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}; type --out=another/folder") from None
    if command == "ab":
        result = ab(places, asked, device)
    elif command == "run":
        result = whole_run(places, sizes)
    elif command == "decode":
        result = decode(places, sizes, device)
    elif command == "why":
        result = why(places, asked, device)
    elif command in ("ladder", "ablate"):
        result = with_smaller_batches(sizes, lambda s: MEASURES[command](s, device))
    else:
        result = MEASURES[command](sizes, device)
    write_atomically(path, (json.dumps(result, indent=1) + "\n").encode())
    print(as_text(result))
    print(
        f"wrote {path}"
        + ("; python -m report puts it into README.md and docs/" if path.parent.parent == Path("results") else "")
    )
    if result.get("passed") is False:
        sys.exit(1)


if __name__ == "__main__":
    errors.entry(main)
