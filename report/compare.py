"""Compare two results of the same kind: is the second slower than the first by more than their spread?"""

import math
import statistics

from report.render import Table, text_table
from report.results import machine_line, measured
from report.stats import Estimate, difference


def speeds(result: dict) -> dict[str, tuple[float, list[list[float]]]]:
    """{name: (tokens per step, step times by round)} of whatever has step times."""
    if result["kind"] in ("ladder", "ablate"):
        return {e["name"]: (result["sizes"]["tokens_per_step"], e["step_s"]) for e in measured(result)}
    if result["kind"] == "ab":
        return {e["config"]: (e["requested"]["tokens_per_step"], e["step_s"]) for e in result["sides"]}
    if result["kind"] == "shakespeare":
        return {"config/shakespeare.py": (result["requested"]["tokens_per_step"], result["step_s"])}
    return {}


def times_as_fast(a: list[list[float]], b: list[list[float]]) -> Estimate:
    """How many times as fast b is, from step times by round: Welch's 95% interval of the logarithms of the medians of the
    rounds. Where a side has one round only, of its single steps, which know nothing of the drift between rounds.
    """
    if min(len(a), len(b)) > 1:
        a, b = ([statistics.median(times) for times in rounds] for rounds in (a, b))
    else:
        a, b = ([t for times in rounds for t in times] for rounds in (a, b))
    found = difference([-math.log(t) for t in a], [-math.log(t) for t in b])
    return found.map(lambda v: math.exp(v) if v < 700 else math.inf)  # e^700 is near the largest float


def unlike(a: dict, b: dict) -> list[str]:
    """In what two measurements differ that moves the speed, besides the code."""
    places = (("machine", ("hardware", "threads")), ("sizes", ("batch_size", "sequence_length", "tokens_per_step", "n_layer")))
    pairs = [(key, a.get(place, {}).get(key), b.get(place, {}).get(key)) for place, keys in places for key in keys]
    return [f"{key} {x} / {y}" for key, x, y in pairs if x != y]


def verdict(speed: Estimate, max_regression: float | None) -> tuple[str, bool, bool]:
    """(what to call a ratio with its interval, whether it is a regression, whether it is too noisy to tell)."""
    if not speed.known:
        return "no interval", False, max_regression is not None
    middle, low, high = speed
    word = "FASTER" if low > 1 else "SLOWER" if high < 1 else "within the spread"
    if max_regression is None:
        return word, False, False
    slow = high < 1 and middle < 1 - max_regression
    return word + f" by more than {max_regression:.3g}" * slow, slow, low < 1 - max_regression and high >= 1


def compare(a: dict, b: dict, max_regression: float | None = None) -> tuple[str, bool]:
    """Two results side by side, their rungs matched by name: (text, whether B fails).

    A difference counts if it is beyond the spread: if times_as_fast()'s interval leaves out 1. With max_regression (0.03:
    three percent) B fails if a rung is slower by more than that and beyond the spread, if a rung of A was not measured in B,
    or if the two were not measured alike. Without it only what cannot be compared fails.
    """
    lines = [f"{side}: {r['kind']}, {machine_line(r)}" for side, r in (("A", a), ("B", b))]
    in_a, in_b = speeds(a), speeds(b)
    if a["kind"] != b["kind"] or not in_a.keys() & in_b.keys():
        names = [f"{side} has {', '.join(found) or 'no step times'}" for side, found in (("A", in_a), ("B", in_b))]
        return "\n".join([*lines, f"error: there is nothing to compare: {'; '.join(names)}"]), True
    rows, slow, blurred = [], [], []
    for name in in_a | in_b:
        if name not in in_a or name not in in_b:
            rows.append([name, "–", "–", "–", f"only in {'A' if name in in_a else 'B'}"])
            continue
        medians = [
            tokens / statistics.median(t for times in rounds for t in times) for tokens, rounds in (in_a[name], in_b[name])
        ]
        speed = times_as_fast(in_a[name][1], in_b[name][1])
        word, is_slow, is_blurred = verdict(speed, max_regression)
        slow += [name] * is_slow
        blurred += [name] * is_blurred
        rows.append([name, *(f"{m:,.0f}" for m in medians), speed.text("{:.3f}".format), word])
    head = ["", "A tok/s", "B tok/s", "B / A [95%]", ""]
    lines += ["", text_table(Table(head, rows, left=(0, 4))), ""]
    several = all(len(rounds) > 1 for found in (in_a, in_b) for _, rounds in found.values())
    of = "the medians of the rounds" if several else "single steps where there is one round: drift between rounds is unknown"
    lines.append(f"tok/s: median of all steps. Interval: Welch's 95%, of {of}.")
    if differs := unlike(a, b):
        lines.append(f"Not measured alike, so a difference may have another cause than the code: {', '.join(differs)}.")
    if blurred:
        lines.append(f"Too noisy to see a loss of {max_regression:.3g}: {', '.join(blurred)}; use more --rounds.")
    if max_regression is None:
        return "\n".join(lines), False
    missing = [name for name in in_a if name not in in_b]
    reasons = [f"slower: {', '.join(slow)}"] * bool(slow) + [f"not in B: {', '.join(missing)}"] * bool(missing)
    reasons += ["not measured alike"] * bool(differs)
    return "\n".join([*lines, f"FAILED: {'; '.join(reasons)}." if reasons else "passed"]), bool(reasons)
