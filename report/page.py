"""Results and their plots -> one HTML page that needs nothing but itself: page.html.j2, filled in.

It is a pure function of the JSON and the plots, so --check can make it again and compare.
"""

import re
from collections import Counter
from pathlib import Path

from base.files import ROOT
from report import kinds, plots, results

# What the page may load: nothing. It styles itself; images could only lie inside it.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"

# kind -> heading and what it is about; the page's sections come in this order
SECTIONS = {
    "ladder": (
        "The ladder",
        "Each row adds one setting to the row before it. The training stays the same; only its speed changes.",
    ),
    "ablate": ("The ablation", "The top rung with one setting put back at a time: what each is worth when all others are on."),
    "candidates": ("Candidates", "The top rung with one other setting at a time: what might be faster on this machine."),
    "why": ("Where a step goes", "One profiled step, each part beside the least time that it can take on this machine."),
    "verify": (
        "Verification",
        "Every setting against a float64 reference that shares no line with the model or the optimizer.",
    ),
    "scale": (
        "Scaling laws",
        "Equal FLOPs on models of different sizes, the law fitted to all of them, and a larger run that it predicted.",
    ),
    "shakespeare": (
        "make train",
        "The first command of the README, from an empty compiler cache, and the text that it ends with.",
    ),
    "start": ("Starting", "Seconds until the first step, without and with compiled code from an earlier start."),
    "run": ("Whole runs", "A config from its first step to its last, evaluated, and a text that the model wrote."),
    "evaluate": ("Evaluation", "What a model is worth on text that it has not seen."),
    "data": (
        "Preparing data",
        "Tokens per second of the whole pipeline beside those of the tokenizer alone on the same cores.",
    ),
    "faults": ("When things go wrong", "Faults that were really caused, and what happened to the run."),
    "kills": ("Twenty kills", "A real run, killed at random moments, against the same run undisturbed."),
    "safety": ("What safety costs", "Reproducible kernels, and saving in the foreground and in the background."),
    "stages": ("The stages", "From GPT-2's shape with random weights to GPT-2's own initialisation."),
    "sampling": ("Sampling", "Decoding with and without the cache of keys and values."),
    "decode": ("Decoding", "Tokens per second in fewer bits, beside the time that reading the weights takes."),
    "ab": ("Two configs", "Seed by seed, in alternating order."),
}


def inline(name: str, svg: str) -> str:
    """A plot as part of the page: in its text colour, without comments, and with names that no other plot has.

    A page may have a name only once, and every plot has an "axes_1": what is referred to is named after its plot as well.
    """
    svg = svg[svg.index("<svg") :].replace(plots.GREY, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", svg)
    return re.sub(r'(url\(|href=")#', rf"\1#{name}-", svg).strip()


def hardware(found: dict[Path, dict]) -> dict[str, str]:
    """{folder of results: the hardware's name}, no name twice: of two folders with one name each shows its own."""
    names = {source.parent.name: result["machine"]["hardware"] for source, result in found.items()}
    often = Counter(names.values())
    return {slug: name if often[name] == 1 else f"{name} ({slug})" for slug, name in names.items()}


def page(sources: list[Path], docs: Path) -> str:
    """The whole page: per hardware what was measured there. Plots that were not drawn are left out."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    drawn: dict[Path, list[dict]] = {}
    for plot, source, _, words in plots.plots(sources, docs):
        if plot.is_file():
            svg = inline(plot.stem, plot.read_text(encoding="utf-8"))
            drawn.setdefault(source, []).append({"svg": Markup(svg), "words": words})  # drawn by us, from escaped text
    found = {source: results.load(source) for source in sources}
    places = hardware(found)
    machines: dict[str, dict] = {slug: {"name": name, "items": []} for slug, name in places.items()}
    for source, result in sorted(found.items(), key=lambda item: list(SECTIONS).index(item[1]["kind"])):
        title, about = SECTIONS[result["kind"]]
        if which := source.stem.removeprefix(result["kind"]).strip("._"):  # run_enwik8.json
            title += f": {which}"
        if len(places) > 1:
            title += f", {places[source.parent.name]}"
        shown = {"title": title, "about": about, "result": result, "blocks": kinds.blocks(result)}
        machines[source.parent.name]["items"].append(shown | {"figures": drawn.get(source, [])})
    environment = Environment(
        loader=FileSystemLoader(ROOT / "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("page.html.j2").render(machines=machines, policy=POLICY)
