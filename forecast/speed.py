"""How fast a planned run will be, from what results/ has measured on the same hardware."""

import math
import statistics
from dataclasses import dataclass, fields
from pathlib import Path

from base.errors import UserError
from configurator import Config
from engine import machine
from report import results as records

# What a step's speed depends on besides its sizes, the most important first.
SETTINGS = ["dtype", "fp32_precision", "compile", "attention", "reuse_memory", "fused_adamw", "deterministic", "processes"]
SIZES = ["n_layer", "n_embd", "T", "tokens_per_step", "micro_batch"]
FAR = 3.0  # sum of |ln(size here / size there)| from which scaling by FLOPs is called a guess


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Tokens per second of a whole run, and where the figure is from."""

    tokens_per_s: float | None = None
    first_step_s: float | None = None  # which compiles
    source: str
    unlike: tuple[str, ...] = ()  # settings in which the source differs


def requested(entry: dict) -> Config:
    """The settings of a committed result, which an earlier version may have written."""
    names = {f.name for f in fields(Config)}
    return Config(**{name: value for name, value in entry["requested"].items() if name in names})


def traits(cfg: Config, processes: int) -> dict:
    """What decides the speed of a step."""
    found = {name: getattr(cfg, name) for name in [*SETTINGS[:-1], *SIZES[:-1]]}
    if cfg.dtype != "float32":
        found["fp32_precision"] = None  # acts on nothing
    return found | {"processes": processes, "micro_batch": cfg.split_step(processes)[0]}


def measured(hardware: str | None, results: Path) -> list[tuple[str, dict]]:
    """(name, entry) of everything in results/ on this hardware that has whole steps."""
    found = []
    for path in sorted(p for p in results.glob("*/*.json") if ".trial" not in p.name):
        result = records.load(path)
        if result["kind"] not in ("ladder", "ablate", "shakespeare", "ab", "run") or result["machine"]["hardware"] != hardware:
            continue
        entries = result["sides"] if result["kind"] == "ab" else records.measured(result) if "rungs" in result else [result]
        name = f"results/{path.parent.name}/{path.name}"
        found += [(f"{name} {e['name']}" if "name" in e else name, e) for e in entries]
    return found


def rate(cfg: Config, processes: int, hardware: str | None, results: Path) -> Rate:
    """From the nearest result measured on this hardware: as many equal settings as possible, then near sizes. Other sizes are
    scaled by FLOPs per token. Without a result, what a GPU's data sheet allows."""
    here, flops, found = traits(cfg, processes), cfg.flops_per_token(cfg.T), []
    for name, e in measured(hardware, results):
        try:
            there = requested(e)
        except UserError:
            continue  # it has a setting that no longer exists
        other = traits(there, e.get("effective", {}).get("processes", 1))
        differ = [trait for trait in here if here[trait] != other[trait]]
        weight = sum(len(SETTINGS) - SETTINGS.index(trait) for trait in differ if trait in SETTINGS)
        apart = sum(abs(math.log(here[trait] / other[trait])) for trait in SIZES)
        seconds = statistics.median(records.all_steps(e)) if "step_s" in e else there.tokens_per_step / e["tokens_per_s"]
        tokens = there.tokens_per_step / seconds * there.flops_per_token(there.T) / flops
        if cfg.device == "cuda":  # each process has a GPU of its own; on a CPU they share it
            tokens *= processes / other["processes"]
        first = e.get("first_step_s") if there.compile == cfg.compile else None
        first = statistics.median(first) if isinstance(first, list) else first
        how = "measured:" if not differ else "scaled by FLOPs from" if apart < FAR else "a guess, by FLOPs from"
        close = Rate(tokens_per_s=tokens, first_step_s=first, source=f"{how} {name}", unlike=tuple(differ))
        found.append(((weight, apart, name), close))
    if found:
        return min(found, key=lambda pair: pair[0])[1]
    peak = machine.peak_flops_of(hardware) if hardware and cfg.device == "cuda" else None
    if peak:
        sheet = "AT MOST: the data sheet's peak; good runs reach a third to a half of it"
        return Rate(tokens_per_s=processes * peak / flops, source=sheet)
    return Rate(source="not known: results/ has nothing from this hardware; run python bench.py ladder")
