"""Measurements -> plots (SVG in docs/) and one HTML page that needs nothing but itself. report.py calls it.

Plots carry the digest of the JSON that they were drawn from, and the page is a pure function of the JSON and the plots: so
report.py --check can tell, without drawing anything, that all of them belong together. Never imports torch.
"""

import hashlib
import html
import io
import re
import statistics
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

from report import tables
from report.tables import Block, Quote, Table

# ---- plots ------------------------------------------------------------------------------------------------------------

# Okabe & Ito's colours for all kinds of colour vision, without the black and the yellow that vanish on one of the grounds.
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"]
# Text on a transparent ground: as far from white as from a dark page. The HTML page replaces it by its own text colour.
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
            "svg.fonttype": "none",  # letters stay letters: they can be read aloud, searched and selected
            "svg.hashsalt": "nanoladder",  # names inside the file do not change from run to run
            **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GREY),
        }
    )
    return plt


def short(name: str) -> str:
    """A label that leaves room for the plot."""
    return name if len(name) <= 40 else name[:39] + "…"


def bars(axes, names: list[str], values: list[float], spread: list[tuple[float, float]]) -> None:
    """Horizontal bars from top to bottom with whiskers from least to most, and each value at the end of its line."""
    at = range(len(names))
    # the median of all steps may lie outside the range of its rounds' medians: no whisker on that side
    errors = [[max(0.0, v - low), max(0.0, high - v)] for v, (low, high) in zip(values, spread, strict=True)]
    axes.barh(
        at,
        values,
        height=0.65,
        color=COLOURS[0],
        xerr=list(zip(*errors, strict=True)),
        error_kw=dict(ecolor=GREY, capsize=3, linewidth=1),
    )
    right = max(high for _, high in spread)
    for i, (value, (_, high)) in enumerate(zip(values, spread, strict=True)):
        axes.text(max(value, high) + 0.015 * right, i, f"{value:,.0f}", va="center")
    axes.set_xlim(0, 1.12 * right)
    axes.set_yticks(at, names)
    axes.invert_yaxis()


def plot_speed(result: dict):
    """Tokens per second of each rung of a ladder, or of each setting put back in an ablation."""
    rows, tokens = tables.measured(result), result["sizes"]["tokens_per_step"]
    rounds = [[tokens / t for t in tables.per_round(e)] for e in rows]
    figure, axes = pyplot().subplots(figsize=(8, 1.2 + 0.36 * len(rows)), layout="constrained")
    names = [short(tables.label(e, result["kind"])) for e in rows]
    bars(axes, names, [tables.tokens_per_s(result, e) for e in rows], [(min(r), max(r)) for r in rounds])
    what = (
        "The ladder: one setting more in each row" if result["kind"] == "ladder" else "The top rung with one setting put back"
    )
    axes.set(title=what, xlabel=f"tokens/s (median of all steps; whiskers: least and most of {len(rounds[0])} rounds)")
    return figure


def plot_losses(result: dict):
    """The losses of all rungs over each other, and below how far each lies from the first row's."""
    rows = tables.measured(result)
    figure, (above, below) = pyplot().subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    styles = [(c, line) for line in ("-", "--", ":") for c in COLOURS]
    for (colour, line), entry in zip(cycle(styles), rows, strict=False):
        steps, how = range(1, len(entry["losses"]) + 1), dict(color=colour, linestyle=line, linewidth=1.5)
        above.plot(steps, entry["losses"], label=short(tables.label(entry, result["kind"])), **how)
        difference = tables.loss_differences(entry, rows[0])
        below.plot(range(1, len(difference) + 1), difference, marker=".", **how)
    above.set(title="The same losses on every rung", ylabel="loss (nats per token)")
    below.set(xlabel="step", ylabel="minus the first row's (nats)")
    below.ticklabel_format(axis="y", scilimits=(-2, 2))
    below.xaxis.get_major_locator().set_params(integer=True)
    above.legend(frameon=False, fontsize="small", bbox_to_anchor=(1, 1), loc="upper left")
    return figure


def plot_run(result: dict):
    """Training and validation loss of a whole run."""
    figure, axes = pyplot().subplots(figsize=(8, 4), layout="constrained")
    axes.plot(range(1, len(result["losses"]) + 1), result["losses"], color=COLOURS[0], linewidth=1, label="training")
    steps = sorted(map(int, result["val_losses"]))
    values = [result["val_losses"][str(s)] for s in steps]
    axes.plot(steps, values, color=COLOURS[1], marker="o", markersize=4, label="validation")
    axes.set(title=result["config"], xlabel="step", ylabel="loss (nats per token)")
    axes.legend(frameon=False)
    return figure


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
    axes.set(
        xlabel="ms per step",
        title=f"Where a step of {result['step_ms']:,.0f} ms goes; its floor is {result['floor_ms']:,.0f} ms",
    )
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


def plot_isoflop(result: dict):
    """Losses over size, budget by budget, with the law's curves and the run that it predicted; below, the best tokens per
    parameter.
    """
    fit, held, guess = result["fit"], result["held_out"], result["held_out"]["predicted"]
    colours = [c for c in COLOURS if c != COLOURS[4]]  # that one is the held-out run's
    figure, (above, below) = pyplot().subplots(2, 1, figsize=(8, 8), height_ratios=(5, 3), layout="constrained")

    def curve(C: float, low: float, high: float, **how) -> None:
        sizes = [low * (high / low) ** (i / 60) for i in range(61)]
        losses = [tables.law_loss(fit["law"], N, C / 6 / N) for N in sizes]
        above.plot(sizes, losses, zorder=1, **how)
        beside = dict(xytext=(6, 0), textcoords="offset points", va="center", fontsize="small")
        above.annotate(power_of_ten(C), (sizes[-1], losses[-1]), **beside)

    for level, colour in zip(fit["levels"], cycle(colours), strict=False):
        C, best = level["budget"], level["law"]["N"]
        runs = [r for r in result["runs"] if r["budget"] == C]
        sizes = sorted({r["N"] for r in runs})
        curve(C, sizes[0] / 1.15, sizes[-1] * 1.15, color=colour, linewidth=1.5)
        means, reach = mean_and_reach([[r["loss"] for r in runs if r["N"] == N] for N in sizes])
        above.errorbar(sizes, means, reach, color=colour, fmt="o", markersize=5, capsize=3, linewidth=1)
        if best and sizes[0] / 1.15 <= best <= sizes[-1] * 1.15:
            least = tables.law_loss(fit["law"], best, C / 6 / best)
            above.plot([best], [least], color=colour, marker="D", markersize=9, fillstyle="none", markeredgewidth=1.5)
    above.plot([], [], color=GREY, linestyle="none", marker="o", markersize=5, label="measured (whiskers: all seeds)")
    above.plot([], [], color=GREY, marker="D", markersize=9, fillstyle="none", label="the law, and where it is least")
    curve(held["budget"], held["N"] / 2, held["N"] * 2, color=GREY, linewidth=1.2, linestyle="--")
    reach = [[guess["loss"] - guess["low"]], [guess["high"] - guess["loss"]]]
    label = "what it predicts, with the 95% interval"
    above.errorbar([held["N"]], [guess["loss"]], reach, color=GREY, capsize=6, linewidth=1.5, linestyle="--", label=label)
    if held["runs"]:
        means, reach = mean_and_reach([[r["loss"] for r in held["runs"]]])
        how = dict(color=COLOURS[4], fmt="*", markersize=13, capsize=3, linewidth=1, label="what was then measured")
        above.errorbar([held["N"]], means, reach, **how)
    above.set(xscale="log", xlabel="parameters N", ylabel="validation loss (nats per token)")
    above.set_title("Equal FLOPs (C = 6ND, beside each curve) on models of different sizes")
    above.margins(x=0.1)
    above.legend(frameon=False, fontsize="small", loc="lower left")

    budgets = [level["budget"] for level in fit["levels"]]
    known = [(level["budget"], level["law"]) for level in fit["levels"] if level["law"]["ratio"]]
    below.plot([c for c, _ in known], [o["ratio"] for _, o in known], label="by the law, with its 95% interval")
    ends = [(c, *o["ratio_interval"]) for c, o in known if None not in o["ratio_interval"]]
    if ends:
        below.fill_between(*zip(*ends, strict=True), color=COLOURS[0], alpha=0.2, linewidth=0)
    label = "by a parabola through each budget's losses"
    for c, found in ((level["budget"], level["parabola"]) for level in fit["levels"] if level["parabola"]["ratio"]):
        low, high = found["ratio_interval"] or (found["ratio"], found["ratio"])
        reach = [[max(0.0, found["ratio"] - (low or 0.0))], [max(0.0, (high or found["ratio"]) - found["ratio"])]]
        how = dict(color=COLOURS[1], fmt="o", markersize=5, capsize=3, linewidth=1, label=label)
        below.errorbar([c], [found["ratio"]], reach, **how)
        label = None
    below.axhline(tables.CHINCHILLA["ratio"], color=GREY, linestyle="--", linewidth=1, label="Chinchilla's, of BPE tokens")
    below.set(xscale="log", yscale="log", xlabel="budget C (FLOPs)", ylabel="best tokens per parameter")
    below.set_ylim(top=2.5 * below.get_ylim()[1])  # room for the legend
    below.legend(frameon=False, fontsize="small", loc="upper left")
    for axis in (above.xaxis, below.yaxis):  # 1, 2 and 5 of each power of ten, written out
        axis.get_major_locator().set_params(subs=(1, 2, 5))
        axis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        axis.set_minor_formatter(lambda x, _: "")
    below.set_xticks(budgets, [power_of_ten(c) for c in budgets])
    below.xaxis.set_minor_formatter(lambda x, _: "")
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
    svg = file.getvalue()
    return svg[svg.index("<svg") :].replace("<svg", f"<!-- sha256 of {source.name}: {digest(source)} -->\n<svg", 1)


def plots(sources: list[Path], docs: Path) -> list[tuple[Path, Path, Callable, str]]:
    """(plot, its JSON, what draws it, in words) of all that is to be drawn."""
    found = []
    for source in sources:
        result = tables.load(source)
        if result["kind"] in ("ladder", "ablate") and not tables.measured(result):
            continue
        for name, draw, words in PLOTS.get(result["kind"], []):
            which = source.stem.removeprefix(result["kind"])  # run_enwik8.json
            found.append((docs / f"{name}{which}-{source.parent.name}.svg", source, draw, words))
    return found


def is_in_step(plot: Path, source: Path) -> bool:
    """Whether a plot was drawn from what its JSON holds now. How it was drawn is not checked."""
    return plot.is_file() and digest(source) in plot.read_text(encoding="utf-8")[:200]


def plot_curves(records: list[dict], title: str, path: Path) -> None:
    """Training and validation loss from the records of a run's log. Of a step that was done twice the later one counts."""
    curves: dict[str, dict[int, float]] = {"loss": {}, "val_loss": {}}
    for record in records:
        for name in curves.keys() & record.keys():
            curves[name][record["step"]] = record[name]
    figure, axes = pyplot().subplots(figsize=(8, 4.5), layout="constrained")
    for name, label, how in (
        ("loss", "training", dict(linewidth=1)),
        ("val_loss", "validation", dict(marker="o", markersize=4)),
    ):
        points = sorted((step, loss) for step, loss in curves[name].items() if loss is not None)  # None: it was not finite
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **how)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
    pyplot().close(figure)


# ---- the page ---------------------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark;
  --text: #1b1f24; --soft: #57606a; --ground: #ffffff; --line: #d0d7de; --band: #f6f8fa; --link: #0550ae }
@media (prefers-color-scheme: dark) { :root {
  --text: #e6edf3; --soft: #9da7b3; --ground: #0d1117; --line: #30363d; --band: #161b22; --link: #79c0ff } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; color: var(--text); background: var(--ground);
  font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: break-word }
h1 { line-height: 1.2; margin: 0.5rem 0 }
h2 { margin: 3rem 0 1rem; border-bottom: 1px solid var(--line) }
h3 { margin: 2.5rem 0 0.5rem }
p { max-width: 48rem }
p.note { color: var(--soft); font-size: 0.875rem }
a { color: var(--link) }
nav ul { display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; padding: 0; list-style: none }
.wide { overflow-x: auto; margin: 0.75rem 0 }
.wide:focus-visible { outline: 2px solid var(--link) }
table { border-collapse: collapse; font-size: 0.875rem; font-variant-numeric: tabular-nums }
th, td { padding: 0.3rem 0.7rem; text-align: right; vertical-align: top; white-space: nowrap;
  border-bottom: 1px solid var(--line) }
thead th { background: var(--band) }
tbody th { font-weight: 500 }
.left { text-align: left }
figure svg { display: block; width: 100%; max-width: 60rem; min-width: 36rem; height: auto }
pre { padding: 0.75rem; overflow-x: auto; background: var(--band); border: 1px solid var(--line);
  border-radius: 0.4rem; font-size: 0.875rem }
code { font-size: 0.9em }
"""

# What the page may load: nothing. It styles itself; images could only lie inside it.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"

# kind -> heading and what it is about; the page's sections come in this order
SECTIONS = {
    "ladder": (
        "The ladder",
        "Each row adds one setting to the row before it. The training stays the same; only its speed moves.",
    ),
    "ablate": ("The ablation", "The top rung with one setting put back at a time: what each is worth when all others are on."),
    "candidates": ("Candidates", "The top rung with one other setting at a time: what might be faster on this machine."),
    "why": ("Where a step goes", "One profiled step, each part beside the least time that it can take on this machine."),
    "verify": ("Proof", "Every setting against a float64 reference that shares no line with the model or the optimizer."),
    "scale": (
        "Scaling laws",
        "Equal FLOPs on models of different sizes, the law fitted to all of them, and a larger run that it predicted.",
    ),
    "shakespeare": ("The main job", "What make train does, from an empty compiler cache, and the text that it ends with."),
    "start": ("Starting", "Seconds until the first step, with and without compiled code from an earlier start."),
    "run": ("Whole runs", "A config from its first step to its last, evaluated, and a text that the model wrote."),
    "evaluate": ("EvalConfig", "What a model is worth on text that it has not seen."),
    "data": (
        "Preparing data",
        "Tokens per second of the whole pipeline beside those of the tokenizer alone on the same cores.",
    ),
    "faults": ("When things go wrong", "Faults that were really caused, and what became of the run."),
    "kills": ("Twenty kills", "The real run, killed at random moments, against the same undisturbed."),
    "safety": ("What safety costs", "Reproducible kernels, and saving in the foreground and in the background."),
    "stages": ("The stages", "From GPT-2's shape with random weights to GPT-2's own initialisation."),
    "sampling": ("SampleConfig", "Decoding with and without the cache of keys and values."),
    "decode": ("Decoding", "Tokens per second in fewer bits, beside the time that reading the weights takes."),
    "ab": ("Two configs", "Seed by seed, in alternating order."),
}


def html_table(table: Table) -> str:
    def cell(tag: str, i: int, text: str, scope: str = "") -> str:
        kind = ' class="left"' if i in table.left else ""
        return f"<{tag}{scope}{kind}>{html.escape(text)}</{tag}>"

    head = "".join(cell("th", i, text, ' scope="col"') for i, text in enumerate(table.head))
    rows = (
        "<tr>" + "".join(cell("td", i, c) if i else cell("th", i, c, ' scope="row"') for i, c in enumerate(row)) + "</tr>"
        for row in table.rows
    )
    body = "\n".join(rows)
    # it scrolls by itself when it is wider than the screen, with the keyboard too
    name = html.escape(table.head[0] or "table")
    return (
        f'<div class="wide" role="region" aria-label="table: {name}" tabindex="0"><table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def html_block(block: Block) -> str:
    if isinstance(block, Table):
        return html_table(block)
    if isinstance(block, Quote):
        return f"<pre>{html.escape(block.text)}</pre>"
    return f'<p class="note">{html.escape(block)}</p>'


def html_figure(name: str, svg: str, words: str) -> str:
    """A plot inside the page, in its text colour, with its description for those who cannot see it."""
    svg = svg[svg.index("<svg") :].replace(GREY, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # A page may have a name only once, and every plot has an "axes_1": what is referred to is named after its plot as well
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{name}-", svg)
    svg = re.sub(r"<svg\b", f'<svg role="img" aria-label="{html.escape(words)}"', svg, count=1)
    return f'<figure class="wide" tabindex="0">{svg.strip()}</figure>'


def page(sources: list[Path], docs: Path) -> str:
    """The whole page: per hardware what was measured there. Plots that were not drawn are left out."""
    drawn = plots(sources, docs)
    hardware = dict.fromkeys(source.parent.name for source in sources)
    links, parts = [], []
    for slug in hardware:
        results = {s: tables.load(s) for s in sources if s.parent.name == slug}
        name = html.escape(next(iter(results.values()))["machine"]["hardware"])
        links.append(f'<li><a href="#{html.escape(slug)}">{name}</a></li>')
        parts.append(f'<section id="{html.escape(slug)}">\n<h2>{name}</h2>')
        for source, result in sorted(results.items(), key=lambda item: list(SECTIONS).index(item[1]["kind"])):
            title, about = SECTIONS[result["kind"]]
            figures = [
                html_figure(p.stem, p.read_text(encoding="utf-8"), w) for p, s, _, w in drawn if s == source and p.is_file()
            ]
            parts += [f"<section>\n<h3>{title}</h3>", f"<p>{about}</p>"]
            shown = tables.blocks(result)
            parts += [html_block(shown[0]), *figures, *map(html_block, shown[1:])]
            parts.append(f'<p class="note">Made by <code>{html.escape(result.get("command", "?"))}</code></p>\n</section>')
        parts.append("</section>")
    content, places = "\n".join(parts), "\n".join(links)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="description" content="GPT-2 training, one measured setting at a time">
<link rel="icon" href="data:,">
<title>nanoladder: what was measured</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>nanoladder: what was measured</h1>
<p>GPT-2's training step from its plain form to its fast form, one setting at a time. Every number and every plot here was
generated by <code>python report.py</code> from the JSON in <code>results/</code>; this page asks nothing of the network.</p>
<nav aria-label="hardware"><ul>
{places}
</ul></nav>
</header>
<main>
{content}
</main>
</body>
</html>
"""
