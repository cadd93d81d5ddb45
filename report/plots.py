"""Results and logs -> plots, drawn by matplotlib, which is imported only when something is drawn.

A plot in docs/ starts with the sha256 of the JSON that it was drawn from, so that --check can compare them without drawing.
"""

import hashlib
import io
import re
import statistics
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

from report import results
from report.stats import Estimate

# Okabe & Ito's colours for all kinds of colour vision, without the black and the yellow that vanish on one of the grounds.
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"]
# Text on a transparent ground: as far from white as from a dark page. The HTML page replaces it with its own text colour.
GREY = "#777777"


def pyplot():
    """matplotlib without a window, imported only when something is drawn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "figure.dpi": 120,
            "figure.constrained_layout.w_pad": 0.12,  # inches between the labels and the edges
            "figure.constrained_layout.h_pad": 0.1,
            "font.family": "DejaVu Sans",  # comes with matplotlib: the same letters on every machine
            "svg.fonttype": "path",  # outlines: no viewer needs the font, and no other font's width cuts a label off
            "text.parse_math": False,  # a "$" in a name is a dollar
            "svg.hashsalt": "nanoladder",  # names inside the file do not change from run to run
            **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GREY),
        }
    )
    return plt


def short(name: str) -> str:
    """A label that leaves room for the plot."""
    return name if len(name) <= 40 else name[:39] + "…"


def plot_speed(result: dict):
    """Tokens per second of each rung of a ladder, or of each setting put back in an ablation."""
    rows, tokens = results.measured(result), result["sizes"]["tokens_per_step"]
    rounds = [[tokens / t for t in results.per_round(e)] for e in rows]
    values = [results.tokens_per_s(result, e) for e in rows]
    # the median of all steps may lie outside the range of its rounds' medians: no whisker on that side
    pairs = list(zip(values, rounds, strict=True))
    reach = [[max(0.0, v - min(r)) for v, r in pairs], [max(0.0, max(r) - v) for v, r in pairs]]
    figure, axes = pyplot().subplots(figsize=(8, 1.2 + 0.36 * len(rows)), layout="constrained")
    at, caps = range(len(rows)), dict(ecolor=GREY, capsize=3, linewidth=1)
    axes.barh(at, values, height=0.65, color=COLOURS[0], xerr=reach, error_kw=caps)
    right = max(map(max, rounds))
    for i, (entry, (value, speeds)) in enumerate(zip(rows, pairs, strict=True)):
        text = f"{value:,.0f}  {results.ratio(rows[0], entry)[0]:.2f}×"
        axes.text(max(value, *speeds) + 0.015 * right, i, text, va="center")
    axes.set_xlim(0, 1.2 * right)
    axes.set_yticks(at, [short(results.label(e, result["kind"])) for e in rows])
    axes.invert_yaxis()
    title = "The ladder: each row adds one setting to the row above it"
    # of the figure, not of the axes: long names leave the axes too narrow for them
    figure.suptitle(title if result["kind"] == "ladder" else "The top rung with one setting put back")
    whiskers = f"whiskers: least and most of {len(rounds[0])} rounds"
    figure.supxlabel(f"tokens/s, × first row (median of all steps; {whiskers})", size=10)
    return figure


def plot_losses(result: dict):
    """The losses of all rungs over each other, and below how far each lies from the first row's."""
    rows = results.measured(result)
    figure, (above, below) = pyplot().subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    styles = [(c, line) for line in ("-", "--", ":") for c in COLOURS]
    for (colour, line), entry in zip(cycle(styles), rows, strict=False):
        steps, how = range(1, len(entry["losses"]) + 1), dict(color=colour, linestyle=line, linewidth=1.5)
        above.plot(steps, entry["losses"], label=short(results.label(entry, result["kind"])), **how)
        difference = results.loss_differences(entry, rows[0])
        below.plot(range(1, len(difference) + 1), difference, marker=".", **how)
    above.set(title="The same losses on every rung", ylabel="loss (nats per token)")
    below.set(xlabel="step", ylabel="minus the first row's (nats)")
    below.ticklabel_format(axis="y", scilimits=(-2, 2))
    below.xaxis.get_major_locator().set_params(integer=True)
    above.legend(frameon=False, fontsize="small", bbox_to_anchor=(1, 1), loc="upper left")
    return figure


def plot_curves(training: dict[int, float | None], validation: dict[int, float | None], title: str):
    """{step: loss} of a whole run; None: it was not finite."""
    figure, axes = pyplot().subplots(figsize=(8, 4), layout="constrained")
    for losses, how in (
        (training, dict(label="training", linewidth=1)),
        (validation, dict(label="validation", marker="o", markersize=4)),
    ):
        if points := sorted((step, loss) for step, loss in losses.items() if loss is not None):
            axes.plot(*zip(*points, strict=True), **how)
    axes.set(title=title, xlabel="step", ylabel="loss (nats per token)")
    axes.legend(frameon=False)
    return figure


def plot_run(result: dict):
    """Training and validation loss of a measured run."""
    validation = {int(step): loss for step, loss in result["val_losses"].items()}
    return plot_curves(dict(enumerate(result["losses"], 1)), validation, result["config"])


def plot_log(records: list[dict], title: str):
    """The same of the records of a run's log. Of a step that was done twice the later one counts."""
    return plot_curves(*({r["step"]: r[name] for r in records if name in r} for name in ("loss", "val_loss")), title)


def plot_residual(result: dict):
    """The residual stream's standard deviation through the depth, with and without scaled projections."""
    figure, axes = pyplot().subplots(figsize=(8, 3.6), layout="constrained")
    for name, label in (("unscaled", "residual projections at std 0.02"), ("scaled", "scaled by 1/√(2·n_layer)")):
        axes.plot(result["residual_std"][name], marker="o", markersize=4, label=label)
    axes.set(xlabel="after block (0: the embedding)", ylabel="standard deviation", title="Residual stream at initialisation")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return figure


def plot_shares(result: dict):
    """Each part of a step beside the least time it can take on this machine."""
    shares = [s for s in result["shares"] if s["ms"] or s["floor_ms"]]
    figure, axes = pyplot().subplots(figsize=(8, 1.5 + 0.45 * len(shares)), layout="constrained")
    at = range(len(shares))
    axes.barh([i - 0.2 for i in at], [s["ms"] for s in shares], height=0.4, label="measured")
    axes.barh([i + 0.2 for i in at], [s["floor_ms"] for s in shares], height=0.4, label="floor", color=COLOURS[1])
    right = max(s["ms"] for s in shares)
    for i, s in enumerate(shares):
        axes.text(max(s["ms"], s["floor_ms"]) + 0.015 * right, i, f"{s['ms']:,.1f} ms, {s['share']:.0%}", va="center")
    axes.set_yticks(at, [s["part"] for s in shares])
    axes.set_xlim(0, 1.25 * right)
    axes.invert_yaxis()
    axes.set_title(f"Where a step of {result['step_ms']:,.0f} ms goes; its floor is {result['floor_ms']:,.0f} ms")
    axes.set_xlabel("ms per step")
    axes.legend(frameon=False, loc="lower right")
    return figure


def power_of_ten(x: float) -> str:
    """4.2·10¹⁰"""
    digits, exponent = f"{x:.1e}".split("e")
    return f"{digits.removesuffix('.0')}·10{str(int(exponent)).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


def mean_and_reach(groups: list[list[float]]) -> tuple[list[float], list[list[float]]]:
    """(the mean of each group, how far below and above it the group reaches)."""
    means = [statistics.fmean(g) for g in groups]
    pairs = list(zip(means, groups, strict=True))
    return means, [[m - min(g) for m, g in pairs], [max(g) - m for m, g in pairs]]


def draw_law(axes, result: dict) -> None:
    """Losses over size, budget by budget, with the law's curves and the run that it predicted."""
    fit, held, guess = result["fit"], result["held_out"], result["held_out"]["predicted"]
    colours = [c for c in COLOURS if c != COLOURS[4]]  # that one is the held-out run's

    def curve(C: float, low: float, high: float, **how) -> None:
        sizes = [low * (high / low) ** (i / 60) for i in range(61)]
        losses = [results.law_loss(fit["law"], N, C / 6 / N) for N in sizes]
        axes.plot(sizes, losses, zorder=1, **how)
        beside = dict(xytext=(6, 0), textcoords="offset points", va="center", fontsize="small")
        axes.annotate(power_of_ten(C), (sizes[-1], losses[-1]), **beside)

    for level, colour in zip(fit["levels"], cycle(colours), strict=False):
        C, best = level["budget"], level["law"]["N"]
        runs = [r for r in result["runs"] if r["budget"] == C]
        sizes = sorted({r["N"] for r in runs})
        curve(C, sizes[0] / 1.15, sizes[-1] * 1.15, color=colour, linewidth=1.5)
        means, reach = mean_and_reach([[r["loss"] for r in runs if r["N"] == N] for N in sizes])
        axes.errorbar(sizes, means, reach, color=colour, fmt="o", markersize=5, capsize=3, linewidth=1)
        if best and sizes[0] / 1.15 <= best <= sizes[-1] * 1.15:
            least = results.law_loss(fit["law"], best, C / 6 / best)
            axes.plot([best], [least], color=colour, marker="D", markersize=9, fillstyle="none", markeredgewidth=1.5)
    axes.plot([], [], color=GREY, linestyle="none", marker="o", markersize=5, label="measured (whiskers: all seeds)")
    axes.plot([], [], color=GREY, marker="D", markersize=9, fillstyle="none", label="the law, and where it is least")
    curve(held["budget"], held["N"] / 2, held["N"] * 2, color=GREY, linewidth=1.2, linestyle="--")
    guess = Estimate(guess["loss"], guess["low"], guess["high"])
    reach = [[guess.middle - guess.low], [guess.high - guess.middle]] if guess.known else None
    label = "what it predicts" + ", with the 95% interval" * guess.known
    axes.errorbar([held["N"]], [guess.middle], reach, color=GREY, capsize=6, linewidth=1.5, linestyle="--", label=label)
    if held["runs"]:
        means, reach = mean_and_reach([[r["loss"] for r in held["runs"]]])
        how = dict(color=COLOURS[4], fmt="*", markersize=13, capsize=3, linewidth=1, label="what was then measured")
        axes.errorbar([held["N"]], means, reach, **how)
    axes.set(xscale="log", xlabel="parameters N", ylabel="validation loss (nats per token)")
    axes.set_title("Equal FLOPs (C = 6ND, beside each curve) on models of different sizes")
    axes.margins(x=0.1)
    axes.legend(frameon=False, fontsize="small", loc="lower left")


def draw_best_ratios(axes, fit: dict) -> None:
    """The best tokens per parameter over the budget, by the law and by each budget's own parabola."""
    budgets = [level["budget"] for level in fit["levels"]]
    known = [(level["budget"], level["law"]) for level in fit["levels"] if level["law"]["ratio"]]
    ends = [(c, *o["ratio_interval"]) for c, o in known if o["ratio_interval"] and None not in o["ratio_interval"]]
    label = "by the law" + ", with its 95% interval" * bool(ends)
    axes.plot([c for c, _ in known], [o["ratio"] for _, o in known], label=label)
    if ends:
        axes.fill_between(*zip(*ends, strict=True), color=COLOURS[0], alpha=0.2, linewidth=0)
    label = "by a parabola through each budget's losses"
    for c, found in ((level["budget"], level["parabola"]) for level in fit["levels"] if level["parabola"]["ratio"]):
        low, high = found["ratio_interval"] or (found["ratio"], found["ratio"])
        reach = [[max(0.0, found["ratio"] - (low or 0.0))], [max(0.0, (high or found["ratio"]) - found["ratio"])]]
        how = dict(color=COLOURS[1], fmt="o", markersize=5, capsize=3, linewidth=1, label=label)
        axes.errorbar([c], [found["ratio"]], reach, **how)
        label = None
    axes.axhline(results.CHINCHILLA["ratio"], color=GREY, linestyle="--", linewidth=1, label="Chinchilla's, of BPE tokens")
    axes.set(xscale="log", yscale="log", xlabel="budget C (FLOPs)", ylabel="best tokens per parameter")
    axes.set_ylim(top=2.5 * axes.get_ylim()[1])  # room for the legend
    axes.legend(frameon=False, fontsize="small", loc="upper left")
    axes.set_xticks(budgets, [power_of_ten(c) for c in budgets])
    axes.xaxis.set_minor_formatter(lambda x, _: "")


def plot_isoflop(result: dict):
    """A scaling study: losses and law above, the best tokens per parameter below."""
    figure, (above, below) = pyplot().subplots(2, 1, figsize=(8, 8), height_ratios=(5, 3), layout="constrained")
    draw_law(above, result)
    draw_best_ratios(below, result["fit"])
    for axis in (above.xaxis, below.yaxis):  # 1, 2 and 5 of each power of ten, written out
        axis.get_major_locator().set_params(subs=(1, 2, 5))
        axis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        axis.set_minor_formatter(lambda x, _: "")
    return figure


# kind of result -> its plots: (name of the file, what draws it, what it shows in words)
PLOTS: dict[str, list[tuple[str, Callable, str]]] = {
    "ladder": [
        ("ladder", plot_speed, "Bars: tokens per second of each rung, in the order of the table"),
        ("losses", plot_losses, "Lines: the loss of every rung at each step, and its difference from the first rung's"),
    ],
    "ablate": [("ablate", plot_speed, "Bars: tokens per second of the top rung with each setting put back, as in the table")],
    "stages": [("residual", plot_residual, "Lines: standard deviation of the residual stream behind each block")],
    "run": [("run", plot_run, "Lines: training and validation loss of each step")],
    "why": [("shares", plot_shares, "Bars: milliseconds of each part of a step beside its floor, as in the table")],
    "scale": [("isoflop", plot_isoflop, "Curves: loss over size at equal FLOPs, a predicted run; best tokens per parameter")],
}


def digest(source: Path) -> str:
    return hashlib.sha256(source.read_bytes()).hexdigest()


def svg_text(figure, source: Path) -> str:
    """A figure as SVG, with where it came from in its first comment. The same numbers give the same text."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    pyplot().close(figure)
    svg = re.sub(r' d="[^"]*"', lambda found: re.sub(r"\s+", " ", found[0]), file.getvalue())  # an outline a line
    return svg[svg.index("<svg") :].replace("<svg", f"<!-- sha256 of {source.name}: {digest(source)} -->\n<svg", 1)


def plots(sources: list[Path], docs: Path) -> list[tuple[Path, Path, Callable, str]]:
    """(plot, its JSON, what draws it, in words) of all that is to be drawn."""
    found = []
    for source in sources:
        result = results.load(source)
        if result["kind"] in ("ladder", "ablate") and not results.measured(result):
            continue
        for name, draw, words in PLOTS.get(result["kind"], []):
            which = source.stem.removeprefix(result["kind"])  # run_enwik8.json
            found.append((docs / f"{name}{which}-{source.parent.name}.svg", source, draw, words))
    return found


def is_in_step(plot: Path, source: Path) -> bool:
    """Whether a plot was drawn from what its JSON holds now. How it was drawn is not checked."""
    return plot.is_file() and digest(source) in plot.read_text(encoding="utf-8")[:200]
