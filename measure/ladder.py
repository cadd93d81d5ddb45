"""The ladder of settings: its rungs from config/ladder/, which of them this machine has, and measuring them side by side."""

import functools
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from tqdm import tqdm

import configurator
from base import system
from base.errors import UserError
from base.files import ROOT
from configurator import Config
from engine import machine
from measure.config import BenchConfig
from measure.fresh import in_fresh_process
from measure.results import header
from measure.rounds import UntilCtrlC, say

LADDER = ROOT / "config" / "ladder"  # r01_x.py; r01b_y.py is its twin, beside the chain


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


def load_ladder() -> list[Rung]:
    """The rungs of config/ladder/ in order, each with the rung it changes; a twin behind the rung it stands beside."""
    rungs: list[Rung] = []
    parent = None  # the chain's last rung
    for path in sorted(LADDER.glob("r[0-9][0-9]*.py")):
        rung = Rung(path.stem, configurator.title_of(path), configurator.load_file(str(path)), "", {})
        below = next(r for r in rungs if r.name == rungs[-1].versus) if rung.twin else parent
        changes = configurator.diff(below.cfg, rung.cfg) if below else {}
        if below and len(changes) != 1:
            raise UserError(f"{path} must change exactly one setting of {below.name}, not {', '.join(changes) or 'none'}")
        rungs.append(replace(rung, versus=below.name if below else rung.name, changes=changes))
        parent = parent if rung.twin else rungs[-1]
    return rungs


# ---- what this machine has ----------------------------------------------------------------------------------------------


@functools.cache
def precision_that_runs(how: str, device_type: str) -> str:
    """How float32 matmuls run here with fp32_precision=how. Tried in a fresh process, so that this one does not occupy the
    GPU."""
    found = in_fresh_process(Config(fp32_precision=how, device=device_type), "precision")
    if "error" in found:
        raise UserError(found["error"])
    return found["runs_as"]


def unavailable(cfg: Config, device: torch.device) -> str | None:
    """Why this machine cannot run a config, or None. What it could run but does not is no excuse: effective() finds that."""
    if reason := machine.not_available(cfg, device):
        return reason
    if cfg.fp32_precision != "ieee" and (found := precision_that_runs(cfg.fp32_precision, device.type)) != cfg.fp32_precision:
        return f"fp32_precision={cfg.fp32_precision} does nothing here: float32 matmuls run as {found}"
    devices = {"cuda": torch.cuda.device_count(), "mps": 1}.get(device.type, cfg.processes)  # a CPU runs any number
    if cfg.processes > devices:
        return f"it needs {cfg.processes} GPUs, there is {devices}"
    return None


def pointless(cfg: Config, device: torch.device) -> str | None:
    """Why a config that can run would not be another measurement here, or None."""
    if cfg.attention == "blocked" and device.type != "cpu":
        return "a flash kernel leaves out the scores above the diagonal already"
    if device.type == "cpu" and cfg.processes > system.cores():
        return f"it needs {cfg.processes} cores, there is {system.cores()}"
    if cfg.batch_size > cfg.tokens_per_step // cfg.T:
        return f"a step of {cfg.tokens_per_step} tokens is one micro-batch already: use a larger --tokens_per_step"
    return None


def climb(rungs: list[Rung], sizes: BenchConfig, device: torch.device) -> tuple[list[Rung], dict[str, str]]:
    """The rungs at the given sizes, each with one setting more than the last that is available here, and {name: reason} of
    those that are not: their setting is left out of all later rungs.
    """
    base = rungs[0].cfg.batch_size
    standing = replace(rungs[0], cfg=sizes.apply(rungs[0].cfg, base))  # the last rung of the chain that is available
    climbed, skipped, before = [standing], {}, standing
    for rung in rungs[1:]:
        ((field, (_, value)),) = rung.changes.items()
        if field == "batch_size":
            value = max(1, value * sizes.batch_size // base)
        below = before if rung.twin else standing
        cfg = replace(below.cfg, **{field: value})
        here = Rung(rung.name, rung.title, cfg, below.name, configurator.diff(below.cfg, cfg))
        climbed.append(here)
        if reason := unavailable(cfg, device) or pointless(cfg, device):
            skipped[rung.name] = reason
        if not rung.twin:
            before = standing
            standing = standing if reason else here
    return climbed, skipped


def top_rung(climbed: list[Rung], skipped: dict[str, str]) -> Rung:
    """The highest available rung of the chain in one process: processes on one machine may share what one would use."""
    found = next(r for r in reversed(climbed) if r.name not in skipped and not r.twin and r.cfg.processes <= 1)
    print(f"the top rung here: {found.name}")
    return found


# ---- measuring ----------------------------------------------------------------------------------------------------------


NOT_REACHED = "stopped before it was measured"


class OutOfMemory(Exception):
    """A rung needed more memory than there is."""


def run_rounds(
    rungs: list[Rung], skipped: dict[str, str], sizes: BenchConfig, min_timed: int, halve: bool = True
) -> tuple[dict[str, list[dict]], dict]:
    """Measure every rung `rounds` times, interleaved, and print each as it is done: ({name: [result, …]}, UntilCtrlC's note). A
    rung that fails is added to `skipped`, and after Ctrl-C each that was not reached. Running out of memory is a failure like
    others, or with `halve` OutOfMemory.
    """
    results: dict[str, list[dict]] = {rung.name: [] for rung in rungs}
    with UntilCtrlC() as until, tqdm(total=sizes.rounds * (len(rungs) - len(skipped)), disable=None, unit="run") as bar:
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
                say(rung.name, result)
                if "error" in result:
                    skipped[rung.name] = result["error"]
                    bar.total -= sizes.rounds - number - 1
                    continue
                results[rung.name].append(result)
    if until.interrupted:
        skipped |= {name: NOT_REACHED for name, rounds in results.items() if not rounds and name not in skipped}
    return results, until.note(any(results.values()))


def with_smaller_batches(sizes: BenchConfig, attempt: Callable[[BenchConfig], dict]) -> dict:
    """attempt(sizes), and again with half the micro-batch for all rungs whenever one runs out of memory."""
    while True:
        try:
            return attempt(sizes)
        except OutOfMemory as e:
            if sizes.batch_size == 1:
                raise UserError(f"out of memory even with micro-batches of 1: {e}; use a shorter --sequence_length") from None
            sizes = replace(sizes, batch_size=sizes.batch_size // 2)
            print(f"{e}\nout of memory: repeating every rung with micro-batches of {sizes.batch_size}", file=sys.stderr)


def measure(
    kind: str, sizes: BenchConfig, rungs: list[Rung], skipped: dict[str, str], min_timed: int, halve: bool = True
) -> dict:
    """Measure the ceilings and every rung. All of it as JSON values; UserError if no rung could be measured."""
    ceilings = in_fresh_process(rungs[0].cfg, "ceilings")  # first: after Ctrl-C nothing is started any more
    if "error" in ceilings:
        raise UserError(ceilings["error"])
    results, note = run_rounds(rungs, skipped, sizes, min_timed, halve)
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
    return header(kind, sizes) | note | {"ceilings": ceilings, "rungs": entries}


# ---- the commands -------------------------------------------------------------------------------------------------------


def ladder(sizes: BenchConfig, device: torch.device) -> dict:
    """Every rung that this machine has."""

    def attempt(sizes: BenchConfig) -> dict:
        rungs, skipped = climb(load_ladder(), sizes, device)
        top_rung(rungs, skipped)  # names it
        return measure("ladder", sizes, rungs, skipped, min_timed=2)

    return with_smaller_batches(sizes, attempt)


def ablated(climbed: list[Rung], skipped: dict[str, str]) -> list[Rung]:
    """The top rung, and it with the setting of each rung below put back, from the bottom to the top."""
    chain = {r.name: r for r in climbed if r.name not in skipped and not r.twin}
    top = rung = top_rung(climbed, skipped)
    rungs = [Rung("top", "the top rung", top.cfg, "top", {})]
    while rung.changes:  # down the chain; a twin is never met
        ((field, (before, _)),) = rung.changes.items()
        if field != "fp32_precision" or top.cfg.dtype == "float32":  # else no float32 matmul is left for it to act on
            cfg = replace(top.cfg, **{field: before})
            changes = {field: (getattr(top.cfg, field), before)}  # a later rung may have changed it again
            rungs.insert(1, Rung(f"without_{rung.name}", rung.title, cfg, "top", changes))
        rung = chain[rung.versus]
    return rungs


def ablate(sizes: BenchConfig, device: torch.device) -> dict:
    """The top rung, and it with one setting put back at a time."""
    return with_smaller_batches(
        sizes, lambda sizes: measure("ablate", sizes, ablated(*climb(load_ladder(), sizes, device)), {}, min_timed=3)
    )


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
    # each row compiles anew, with max-autotune for minutes
    tried = {field: CANDIDATES[field][-1:] for field in ("batch_size", "attention")} if sizes.quick else CANDIDATES
    for field, values in tried.items():
        for value in values:
            value = max(1, int(top.batch_size * value)) if field == "batch_size" else value
            cfg = replace(top, **{field: value})
            if cfg == top:
                continue
            rung = Rung(f"{field}={value}", field, cfg, "top", {field: (getattr(top, field), value)})
            rungs.append(rung)
            if reason := unavailable(cfg, device) or pointless(cfg, device):
                skipped[rung.name] = reason
    return measure("candidates", sizes, rungs, skipped, min_timed=3, halve=False)
