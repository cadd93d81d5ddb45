"""How fast a planned run will be, from what results/ has measured on the same hardware."""

import contextlib
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

from base.errors import UserError
from configurator import Config
from engine import machine
from report import results as records

# What a step's speed depends on besides its sizes, the most important first.
SETTINGS = ["dtype", "fp32_precision", "compile", "attention", "reuse_memory", "fused_adamw", "deterministic", "processes"]
SIZES = ["n_layer", "n_embd", "T", "tokens_per_step", "micro_batch"]
# An operator that does less than this share of the work does not scale by FLOPs: in results/ of one CPU, steps took 1.25 times
# what FLOPs predict at a quarter of the work, 1.5 to 2 times at an eighth; 5 times was seen at a twelfth.
LAUNCH_BOUND = 1 / 5
FAR = 3.0  # sum of |ln(size here / size there)| from which scaling by FLOPs is called a guess


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Tokens per second of a whole run, and where the figure is from."""

    tokens_per_s: float | None = None
    first_step_s: float | None = None  # which compiles
    source: str
    unlike: tuple[str, ...] = ()  # settings in which the source differs
    at_most: bool = False  # the run is slower than this
    launch_bound: str = ""  # why, if its operators are too small to be scaled by FLOPs


def traits(cfg: Config, processes: int) -> dict:
    """What decides the speed of a step."""
    found = {name: getattr(cfg, name) for name in [*SETTINGS[:-1], *SIZES[:-1]]}
    if cfg.dtype != "float32":
        found["fp32_precision"] = None  # acts on nothing
    return found | {"processes": processes, "micro_batch": cfg.split_step(processes)[0]}


def measured(hardware: str | None, results: Path) -> Iterator[tuple[str, dict, Config]]:
    """(name, entry, its settings) of everything in results/ on this hardware that has whole steps."""
    names = {f.name for f in fields(Config)}
    for path in sorted(p for p in results.glob("*/*.json") if ".trial" not in p.name):
        result = records.load(path)
        if result["kind"] not in ("ladder", "ablate", "shakespeare", "ab", "run") or result["machine"]["hardware"] != hardware:
            continue
        entries = result["sides"] if result["kind"] == "ab" else records.measured(result) if "rungs" in result else [result]
        for e in entries:
            name = " ".join([f"results/{path.parent.name}/{path.name}", *([e["name"]] if "name" in e else [])])
            with contextlib.suppress(UserError):  # a value that no longer exists
                yield name, e, Config(**{name: value for name, value in e["requested"].items() if name in names})


def rate(cfg: Config, processes: int, hardware: str | None, results: Path) -> Rate:
    """From the nearest result measured on this hardware: as many equal settings as possible, then near sizes. Other sizes are
    scaled by FLOPs per token. Without a result, what a GPU's data sheet allows."""
    here, flops, found = traits(cfg, processes), cfg.flops_per_token(cfg.T), []
    for name, e, there in measured(hardware, results):
        other = traits(there, e.get("effective", {}).get("processes", 1))
        differ = tuple(trait for trait in here if here[trait] != other[trait])
        weight = sum(len(SETTINGS) - SETTINGS.index(trait) for trait in differ if trait in SETTINGS)
        apart = sum(abs(math.log(here[trait] / other[trait])) for trait in SIZES)
        found.append(((weight, apart, name), e, there, other, differ))
    if not found:
        peak = machine.peak_flops_of(hardware) if hardware and cfg.device == "cuda" else None
        if peak:
            sheet = "AT MOST: the data sheet's peak; good runs reach a third to a half of it"
            return Rate(tokens_per_s=processes * peak / flops, source=sheet, at_most=True)
        return Rate(source="not known: results/ has nothing from this hardware; run python bench.py ladder")
    (_, apart, name), e, there, other, differ = min(found, key=lambda one: one[0])
    seconds = statistics.median(records.all_steps(e)) if "step_s" in e else there.tokens_per_step / e["tokens_per_s"]
    there_flops = there.flops_per_token(there.T)
    tokens = there.tokens_per_step / seconds * there_flops / flops
    if cfg.device == "cuda":  # each process has a GPU of its own; on a CPU they share it
        tokens *= processes / other["processes"]
    first = e.get("first_step_s") if there.compile == cfg.compile else None
    first = statistics.median(first) if isinstance(first, list) else first
    how = "measured:" if not differ else "scaled by FLOPs from" if apart < FAR else "a guess, by FLOPs from"
    close = Rate(tokens_per_s=tokens, first_step_s=first, source=f"{how} {name}", unlike=differ)
    # a layer's operators do the FLOPs of a micro-batch
    work = flops * here["micro_batch"] * cfg.T / cfg.n_layer
    share = work / (there_flops * other["micro_batch"] * there.T / there.n_layer)
    if share > LAUNCH_BOUND:
        return close
    bound = f"launch-bound: an operator does 1/{1 / share:.0f} of the work there (1/8 took twice this long)"
    return replace(close, source=f"AT MOST, by FLOPs from {name}", at_most=True, launch_bound=bound)
