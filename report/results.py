"""Read a result file and compute what several tables need: speeds, ratios, names of settings, the machine.

A result is the JSON object that bench.py wrote. Step times are in seconds, one list per round. A round times all rows in turn:
what slows the machine down for a while slows both sides of a ratio.
"""

import json
import re
import statistics
from dataclasses import fields
from pathlib import Path

from base.files import read_text
from configurator import GPTConfig
from report.stats import Estimate, extent, quartiles

# What reading an untrusted or damaged result can raise: no file, not JSON, no such part, not the shape of its kind
DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError)


def load(path: Path) -> dict:
    """A result file. OSError if it cannot be read, ValueError if it is not a JSON object."""
    result = json.loads(read_text(path))
    if not isinstance(result, dict):
        raise ValueError("not a JSON object")
    return result


# ---- step times -------------------------------------------------------------------------------------------------------


def per_round(entry: dict) -> list[float]:
    """Median step time of each round, in seconds."""
    return [statistics.median(times) for times in entry["step_s"]]


def all_steps(entry: dict) -> list[float]:
    """Every timed step of every round, in seconds."""
    return [t for times in entry["step_s"] for t in times]


def ratio(slow: dict, fast: dict) -> Estimate:
    """Median, least and most of slow / fast over the rounds, in which the two ran side by side."""
    return extent([a / b for a, b in zip(per_round(slow), per_round(fast), strict=False)])


def tokens_per_s(result: dict, entry: dict) -> float:
    """From the median of all steps of all rounds."""
    return result["sizes"]["tokens_per_step"] / statistics.median(all_steps(entry))


def loss_differences(entry: dict, base: dict) -> list[float]:
    """Loss minus the first row's, step by step, of the steps that both took."""
    return [a - b for a, b in zip(entry["losses"], base["losses"], strict=False)]


def ms(seconds: float) -> str:
    """Milliseconds with at least three digits: a GPU's step is short."""
    return f"{1e3 * seconds:,.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.1f}" if seconds >= 0.01 else f"{1e3 * seconds:.2f}"


def ms_iqr(entry: dict) -> str:
    """ "397 [390, 406]": median and quartiles of all steps."""
    return quartiles(all_steps(entry)).text(ms)


# ---- operations -------------------------------------------------------------------------------------------------------


def flops_per_token(requested: dict) -> float:
    """Operations per trained token of a recorded config, by GPTConfig's own formula."""
    known = {field.name for field in fields(GPTConfig)}
    model = GPTConfig(**{name: value for name, value in requested.items() if name in known})
    return model.flops_per_token(requested["sequence_length"] or model.block_size)


def gemm_rate(dtype: str, fp32_precision: str, ceilings: dict) -> float | None:
    """FLOP/s that a large matmul reached here in the precision that a config multiplies in; None if it was not measured."""
    how = {"ieee": "float32", "tf32": "tf32", "bf16": "bfloat16"}[fp32_precision] if dtype == "float32" else "bfloat16"
    return ceilings.get(f"gemm_{how}_flops")


def devices(entry: dict) -> int:
    """How many devices, each with the measured ceilings, worked on a row: processes on a CPU share one."""
    on = entry["effective"]
    return on["processes"] if on["device"] == "cuda" else 1


def law_loss(law: dict, N, D):
    """L(N, D) = E + A/N^α + B/D^β: the form of Hoffmann et al. 2022, of numbers or arrays."""
    return law["E"] + law["A"] / N ** law["alpha"] + law["B"] / D ** law["beta"]


# Hoffmann et al. 2022: equation 10 and table 2; the 20 is what its sizes come to
CHINCHILLA = {"alpha": 0.34, "beta": 0.28, "law": 0.46, "parabolas": 0.49, "ratio": 20}

# ---- rows of a ladder or an ablation ----------------------------------------------------------------------------------

# field -> value -> the name that people know it by. A field or value that is not here is shown as it is.
KNOWN_AS = {
    "fp32_precision": {"tf32": "TF32", "bf16": "fp32 matmuls in bf16"},
    "dtype": {"bfloat16": "bf16 autocast", "float16": "fp16 autocast"},
    "compile": {"True": "torch.compile"},
    "attention": {"sdpa": "flash attention", "blocked": "attention by blocks"},
    "vocab_multiple": {"128": "vocab 50304"},
    "fused_adamw": {"True": "fused AdamW"},
    "reuse_memory": {"True": "kept memory"},
    "prefetch": {"True": "prefetch"},
    "sdpa_backend": {"cudnn": "cuDNN attention"},
}


def value_name(field: str, value: object) -> str | None:
    """ "bf16 autocast" for dtype=bfloat16; None if it has no name of its own."""
    if field == "batch_size":
        return f"micro-batch {value}"
    if field == "processes" and value:
        return f"{value} processes"
    return KNOWN_AS.get(field, {}).get(str(value))


def transition(entry: dict) -> str:
    """The field that a row changes: "dtype float32 → bfloat16"."""
    return ", ".join(f"{field} {old} → {new}" for field, (old, new) in entry["changes"].items())


def label(entry: dict, kind: str) -> str:
    """What a row is called: "bf16 autocast" in a ladder, "without bf16 autocast" in an ablation."""
    if not entry["changes"]:
        return "plain fp32" if kind == "ladder" else "top rung"
    names = []
    for field, (old, new) in entry["changes"].items():
        name, former = value_name(field, new), value_name(field, old)
        if kind == "ablate" and former:
            name = f"without {former}"
        names.append(name or f"{field}={new}")
    return ", ".join(names)


def measured(result: dict) -> list[dict]:
    """The rows that were not skipped."""
    return [e for e in result["rungs"] if "skipped" not in e]


def before(result: dict, entry: dict) -> dict:
    """The row that a row is compared with: the one it changes, or if that was skipped, the one below it, and so on."""
    by_name = {e["name"]: e for e in result["rungs"]}
    versus = by_name[entry["versus"]]
    while "skipped" in versus:
        if versus["versus"] == versus["name"]:  # even the first rung failed
            return measured(result)[0]
        versus = by_name[versus["versus"]]
    return versus


def reason(entry: dict) -> str:
    """Why a row was skipped, without the setting, which stands beside it, and without the advice to whoever started it."""
    text = re.sub(r"^.* is what runs: ", "", entry["skipped"])
    return re.sub(r": (type|use|give) .*$", "", text).rstrip(".")


# ---- the machine ------------------------------------------------------------------------------------------------------


def machine_line(result: dict) -> str:
    """Where and when something was measured."""
    m = result["machine"]
    commit = f"{m['commit']}{' + changes' if m['dirty'] else ''}" if m["commit"] else "no commit"
    return f"{m['hardware']}, torch {m['torch']}, {result['date'][:10]}, commit {commit}"
