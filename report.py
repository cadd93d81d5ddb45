"""Raw measurements (results/<hardware>/*.json) -> tables, plots and the README's generated blocks.

    python report.py                        regenerate the README's blocks and the plots in docs/
    python report.py --check                fail if a number in the README is not the one in its JSON
    python report.py out/shakespeare        draw a run's curves from its log.jsonl, into out/shakespeare/curves.png

Everything that is printed is computed here, from raw step times and losses. Never imports torch.
"""

import math
import re
import statistics
from pathlib import Path

README, RESULTS, DOCS = Path("README.md"), Path("results"), Path("docs")


# ---- numbers ----------------------------------------------------------------------------------------------------------


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """(first quartile, median, third quartile)."""
    if len(values) < 2:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def per_round(entry: dict) -> list[float]:
    """Median step time of each round, in seconds."""
    return [statistics.median(times) for times in entry["step_s"]]


def ratio(slow: dict, fast: dict) -> tuple[float, float, float]:
    """(median, least, most) of slow / fast over the rounds, in which the two ran side by side."""
    ratios = [a / b for a, b in zip(per_round(slow), per_round(fast), strict=False)]
    return statistics.median(ratios), min(ratios), max(ratios)


def all_steps(entry: dict) -> list[float]:
    return [t for times in entry["step_s"] for t in times]


def flops_per_token(cfg: dict) -> float:
    """PaLM's count for a resolved config, as model.GPTConfig.flops_per_token (a test compares the two)."""
    rows = math.ceil(cfg["vocab_size"] / cfg["vocab_multiple"]) * cfg["vocab_multiple"]
    T = cfg["sequence_length"] or cfg["block_size"]
    return 6 * (12 * cfg["n_layer"] * cfg["n_embd"] ** 2 + rows * cfg["n_embd"]) + 12 * cfg["n_layer"] * cfg["n_embd"] * T


# ---- tables -----------------------------------------------------------------------------------------------------------


def table(head: list[str], rows: list[list[str]], markdown: bool) -> str:
    """Columns, the first left-aligned and the rest right-aligned, for a terminal or for Markdown."""
    if markdown:
        rule = ["---", *["---:"] * (len(head) - 1)]
        return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *rows])
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = []
    for row in [head, ["-" * w for w in widths], *rows]:
        rest = [cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *rest]).rstrip())
    return "\n".join(lines)


def machine_line(result: dict) -> str:
    """Where and when something was measured."""
    m = result["machine"]
    commit = f"{m['commit']}{' + changes' if m['dirty'] else ''}" if m["commit"] else "no commit"
    return f"{m['hardware']}, torch {m['torch']}, {result['date'][:10]}, commit {commit}"


def step_rows(result: dict, markdown: bool) -> str:
    """The table of a ladder or an ablation; what was skipped stands below it with its reason."""
    ceilings, sizes, is_ladder = result["ceilings"], result["sizes"], result["kind"] == "ladder"
    by_name = {e["name"]: e for e in result["rungs"]}
    base, rows, notes = result["rungs"][0], [], []
    peak = ceilings["peak_flops"]
    for entry in result["rungs"]:
        change = ", ".join(f"{k} {a} → {b}" for k, (a, b) in entry["changes"].items())
        label = change or ("fp32, plain" if is_ladder else "top rung")
        if "skipped" in entry:
            rows.append([label, "skipped", *["–"] * 8])
            notes.append(f"{change}: skipped, {entry['skipped']}.")
            continue
        versus = by_name[entry["versus"]]
        while "skipped" in versus:
            versus = by_name[versus["versus"]]
        low, middle, high = quartiles(all_steps(entry))
        tokens = sizes["tokens_per_step"] / middle
        gain, least, most = ratio(versus, entry) if is_ladder else ratio(entry, versus)
        flops = tokens * flops_per_token(entry["requested"])
        gemm = ceilings[f"gemm_{'float32' if entry['requested']['dtype'] == 'float32' else 'bfloat16'}_flops"]
        difference = max(abs(a - b) for a, b in zip(entry["losses"], base["losses"], strict=False))
        rows.append(
            [
                label,
                f"{1e3 * middle:,.0f} [{1e3 * low:,.0f}, {1e3 * high:,.0f}]",
                f"{tokens:,.0f}",
                f"{gain:.2f}× [{least:.2f}, {most:.2f}]" if entry is not base else "1",
                f"{ratio(base, entry)[0]:.2f}×",
                f"{1 - 1 / gain:.0%}" if is_ladder else f"{gain - 1:+.0%}",
                f"{entry['memory_gib']:.1f}",
                f"{flops / peak:.1%}" if peak else "n/a",
                f"{flops / gemm:.0%}",
                f"{difference:.1e}",
            ]
        )
    if is_ladder:
        head = ["one setting more", "ms/step [IQR]", "tok/s", "× previous [min, max]", "× first", "time saved"]
    else:
        head = ["one setting back", "ms/step [IQR]", "tok/s", "× slower [min, max]", "× top", "time added"]
    text = table([*head, "GiB", "MFU", "of GEMM", "max |Δ loss|"], rows, markdown)
    notes.append(
        f"{machine_line(result)}. B={sizes['batch_size']}, T={sizes['sequence_length']}, {sizes['tokens_per_step']} tokens per "
        f"step; {sizes['rounds']} interleaved round(s); |Δ loss| against the first row over {len(base['losses'])} steps. "
        f"MFU: share of the data-sheet bf16 peak (n/a: not known). Of GEMM: share of what a large matmul in that precision "
        f"reached here: fp32 {ceilings['gemm_float32_flops'] / 1e12:.3g}, bf16 {ceilings['gemm_bfloat16_flops'] / 1e12:.3g} "
        f"TFLOP/s; a copy: {ceilings['copy_bytes_per_s'] / 1e9:.3g} GB/s."
    )
    return "\n\n".join([text, *notes])


def ab_table(result: dict, markdown: bool) -> str:
    """Two configs: step time of each, and their ratio and loss difference with 95% confidence intervals over the seeds."""
    a, b = result["sides"]
    rows = []
    for side in (a, b):
        low, middle, high = quartiles(all_steps(side))
        cfg = side["requested"]
        last = statistics.fmean(losses[-1] for losses in side["losses"])
        ms = f"{1e3 * middle:,.0f} [{1e3 * low:,.0f}, {1e3 * high:,.0f}]"
        rows.append([side["config"], ms, f"{cfg['tokens_per_step'] / middle:,.0f}", f"{last:.4f}"])
    logs = [math.log(x / y) for x, y in zip(per_round(a), per_round(b), strict=True)]
    speed = [math.exp(v) for v in interval(logs)]
    loss = interval([y[-1] - x[-1] for x, y in zip(a["losses"], b["losses"], strict=True)])
    faster = "not distinguishable" if speed[1] <= 1 <= speed[2] else "B is faster" if speed[1] > 1 else "A is faster"
    lower = "not distinguishable" if loss[1] <= 0 <= loss[2] else f"{'A' if loss[1] > 0 else 'B'}'s is lower"
    steps = len(a["losses"][0])
    text = table(["config", "ms/step [IQR]", "tok/s", f"loss at step {steps}"], rows, markdown)
    return (
        f"{text}\n\nB is {speed[0]:.2f}× as fast as A, 95% CI [{speed[1]:.2f}, {speed[2]:.2f}] over {len(logs)} pairs: {faster}. "
        f"Loss of B minus A {loss[0]:+.4f}, 95% CI [{loss[1]:+.4f}, {loss[2]:+.4f}]: {lower}. {machine_line(result)}."
    )


# Student's t, two-sided 95%, by degrees of freedom (any statistics table); beyond 30 the normal's 1.96 is near enough.
T_95 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131]
T_95 += [2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042]


def interval(values: list[float]) -> tuple[float, float, float]:
    """(mean, low, high) of the 95% confidence interval of the mean; infinitely wide for one value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, -math.inf, math.inf
    t = T_95[len(values) - 2] if len(values) - 2 < len(T_95) else 1.96
    half = t * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def sampling_table(result: dict, markdown: bool) -> str:
    speeds = result["tokens_per_s"]
    rows = [[how, f"{statistics.median(v):.1f}", f"[{min(v):.1f}, {max(v):.1f}]"] for how, v in speeds.items()]
    gains = [c / u for c, u in zip(speeds["cached"], speeds["uncached"], strict=True)]
    text = table(["124M, one sequence, float32", "tok/s", "[min, max]"], rows, markdown)
    same = "the same tokens" if result["same_tokens"] else "DIFFERENT TOKENS"
    return (
        f"{text}\n\nThe cache is {statistics.median(gains):.1f}× as fast [{min(gains):.1f}, {max(gains):.1f}], with {same}: "
        f"{result['new_tokens']} tokens after {result['prompt_tokens']}. {machine_line(result)}."
    )


def stages_table(result: dict, markdown: bool) -> str:
    rows = [
        [
            re.sub(r"^Stage (\d): ", r"\1. ", e["title"]),
            f"{e['parameters'] / 1e6:.2f}M",
            f"{e['losses'][0]:.2f}",
            f"{e['losses'][-1]:.4f}" if e["losses"][-1] < 0.1 else f"{e['losses'][-1]:.2f}",
            f"{e['seconds']:.0f} s",
        ]
        for e in result["stages"]
    ]
    steps = len(result["stages"][0]["losses"])
    head = ["stage", "parameters", "loss at step 1", f"loss at step {steps}", "training time"]
    std = result["residual_std"]
    note = (
        f"ln 50257 = {result['ln_vocab_size']:.3f}. Residual stream at init, standard deviation behind the last of 12 blocks: "
        f"{std['scaled'][-1]:.3f} with scaled residual projections, {std['unscaled'][-1]:.3f} without. {machine_line(result)}."
    )
    return f"{table(head, rows, markdown)}\n\n{note}"


TABLES = {
    "ladder": step_rows,
    "ablate": step_rows,
    "ab": ab_table,
    "sampling": sampling_table,
    "stages": stages_table,
}


def as_text(result: dict) -> str:
    return TABLES[result["kind"]](result, markdown=False)
