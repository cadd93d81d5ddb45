"""Raw measurements (results/<hardware>/*.json) -> tables, plots and the README's generated blocks.

    python report.py                        regenerate the README's blocks and the plots in docs/
    python report.py --check                fail if a number in the README is not the one in its JSON
    python report.py out/shakespeare        draw a run's curves from its log.jsonl, into out/shakespeare/curves.png

Everything that is printed is computed here, from raw step times and losses. Never imports torch.
"""

import json
import math
import re
import statistics
import sys
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
        f"{text}\n\nB is {speed[0]:.2f}× as fast as A, 95% CI [{speed[1]:.2f}, {speed[2]:.2f}], {len(logs)} pairs: {faster}. "
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


def shakespeare_table(result: dict, markdown: bool) -> str:
    low, middle, high = quartiles(all_steps(result))
    cfg, seconds = result["requested"], result["seconds"]
    rows = [
        ["parameters", f"{result['parameters'] / 1e6:.2f}M"],
        ["steps × tokens", f"{len(result['losses'])} × {cfg['tokens_per_step']}"],
        ["validation loss", f"{result['val_loss']:.2f}"],
        ["training, start to checkpoint", f"{seconds['train']:.0f} s"],
        ["of it the first step, which compiles", f"{result['first_step_s']:.0f} s"],
        ["ms/step [IQR]", f"{1e3 * middle:.0f} [{1e3 * low:.0f}, {1e3 * high:.0f}]"],
        ["sampling 200 tokens", f"{seconds['sample']:.0f} s"],
        ["start to text", f"{seconds['train'] + seconds['sample']:.0f} s"],
    ]
    text = result["sample"].strip()
    quoted = "\n".join("    " + line for line in text.splitlines()[:16])
    return f"{table(['make train', ''], rows, markdown)}\n\n{machine_line(result)}. It wrote:\n\n{quoted}"


TABLES = {
    "ladder": step_rows,
    "ablate": step_rows,
    "ab": ab_table,
    "sampling": sampling_table,
    "stages": stages_table,
    "shakespeare": shakespeare_table,
}


def as_text(result: dict) -> str:
    return TABLES[result["kind"]](result, markdown=False)


# ---- the README -------------------------------------------------------------------------------------------------------

BLOCK = re.compile(r"(<!-- begin (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def load(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def generated(text: str) -> str:
    """The README with each block `<!-- begin results/…/x.json -->` … `<!-- end -->` made anew from its file."""

    def block(match: re.Match) -> str:
        result = load(Path(match[2]))
        return f"{match[1]}{TABLES[result['kind']](result, markdown=True)}\n{match[4]}"

    return BLOCK.sub(block, text)


def write_readme(check: bool) -> None:
    """Regenerate the README, or with check exit with 1 and a line for each block that is not what its JSON says."""
    text = README.read_text(encoding="utf-8")
    fresh = generated(text)
    if not check:
        README.write_text(fresh, encoding="utf-8")
        print(f"{README}: {len(BLOCK.findall(fresh))} blocks written")
        return
    stale = [old[2] for old, new in zip(BLOCK.finditer(text), BLOCK.finditer(fresh), strict=True) if old[0] != new[0]]
    for path in stale:
        print(f"error: {README} differs from {path}: type python report.py", file=sys.stderr)
    sys.exit(1 if stale else 0)


def plot_residual(result: dict, path: Path) -> None:
    """The residual stream's standard deviation through the depth, with and without scaled projections."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for name, label in (("unscaled", "residual projections at std 0.02"), ("scaled", "scaled by 1/√(2·n_layer)")):
        axes.plot(result["residual_std"][name], marker="o", markersize=3, label=label)
    axes.set(xlabel="after block (0: the embedding)", ylabel="standard deviation", title="Residual stream at initialisation")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    save_figure(figure, path)


def plot_curves(run: Path) -> Path:
    """Training and validation loss of a run, from its log.jsonl. Of a step that was done twice the later record counts."""
    records = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    curves: dict[str, dict[int, float]] = {"loss": {}, "val_loss": {}}
    for record in records:
        for name in curves.keys() & record.keys():
            curves[name][record["step"]] = record[name]
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(*zip(*sorted(curves["loss"].items()), strict=True), linewidth=1, label="training")
    if curves["val_loss"]:
        axes.plot(*zip(*sorted(curves["val_loss"].items()), strict=True), marker="o", label="validation")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=str(run))
    axes.legend(frameon=False)
    return save_figure(figure, run / "curves.png")


def pyplot():
    """matplotlib without a window, imported only when something is drawn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 120})
    return plt


def save_figure(figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})  # no version in it: the same numbers give the same bytes
    return path


def main(argv: list[str]) -> None:
    if argv in ([], ["--check"]):
        write_readme(check=bool(argv))
        for path in sorted(RESULTS.glob("*/stages.json")):
            plot_residual(load(path), DOCS / f"residual-{path.parent.name}.png")
    elif len(argv) == 1 and (Path(argv[0]) / "log.jsonl").is_file():
        print(f"wrote {plot_curves(Path(argv[0]))}")
    else:
        print(f"error: {' '.join(argv)} is no run: type python report.py, or python report.py out/<run>", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
