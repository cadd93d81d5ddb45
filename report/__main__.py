"""Raw measurements (results/<hardware>/*.json) -> the generated blocks of the README and docs/, plots, docs/index.html.

    python report.py                        make all of them anew
    python report.py --check                fail if a number in them is not the one in its JSON
    python report.py out/shakespeare        draw a run's curves from its log.jsonl, into out/shakespeare/curves.png

A generated block of a Markdown file stands between `<!-- begin results/<hardware>/x.json -->` and `<!-- end -->`; words behind
the path choose a part (a rung's name, a check's). --check makes blocks and page anew and compares them to the last character.
Plots it does not draw: each holds the sha256 of the JSON that it was drawn from, and that is compared. Never imports torch.
"""

import json
import math
import re
import statistics
import sys
from pathlib import Path

from report import page, tables
from report.tables import as_text, load

__all__ = ["as_text", "check", "compare", "load", "main", "write"]

# ---- generated blocks -------------------------------------------------------------------------------------------------

# Its text never reaches over the begin of the next: a forgotten end must not swallow what follows
BLOCK = re.compile(r"(<!-- begin (\S+?\.json)((?: +\S+)*?) +-->\n)((?:(?!<!-- begin ).)*?)(<!-- end -->)", re.DOTALL)


def documents(root: Path) -> list[Path]:
    """The Markdown files that may hold generated blocks."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def result_files(root: Path) -> list[Path]:
    """results/<hardware>/<kind>.json, of the kinds that are known. ValueError if one is no JSON."""
    found = []
    for path in sorted((root / "results").glob("*/*.json")):
        try:
            found += [path] * (load(path).get("kind") in tables.KINDS)
        except ValueError as e:
            raise ValueError(f"{path.relative_to(root)} is damaged: {e}") from None
    return found


def generated(text: str, name: str, root: Path) -> tuple[str, list[str]]:
    """(a Markdown text with each block made anew from its file, one line for each block that cannot be made)."""
    errors: list[str] = []

    def block(match: re.Match) -> str:
        source, words = root / match[2], match[3].split()
        try:
            return f"{match[1]}{tables.as_markdown(load(source), words)}\n{match[5]}"
        except FileNotFoundError:
            maker = "tests/faults.py" if source.stem == "faults" else f"bench.py {source.stem}"
            errors.append(f"{match[2]}, which generated blocks show, is not there: type python {maker}")
        except (ValueError, KeyError, TypeError) as e:  # no JSON, no such part, not the shape of its kind
            errors.append(f"{name} cannot show {match[2]}{match[3]}: {type(e).__name__}: {e}")
        return match[0]

    fresh = BLOCK.sub(block, text)
    if text.count("<!-- begin ") != len(BLOCK.findall(text)):
        errors.append(f"{name} has a <!-- begin … --> that names no .json, or has no <!-- end -->")
    return fresh, errors


def write(root: Path) -> list[str]:
    """Make blocks, plots and page anew. What could not be made, one line each; the rest is made nevertheless."""
    errors, docs = [], root / "docs"
    for path in documents(root):
        text = path.read_text(encoding="utf-8")
        fresh, wrong = generated(text, str(path.relative_to(root)), root)
        errors += wrong
        if fresh != text:
            path.write_text(fresh, encoding="utf-8")
            print(f"wrote {path.relative_to(root)}")
    sources = result_files(root)
    if not sources:
        return errors
    docs.mkdir(exist_ok=True)
    for plot, source, draw, _ in page.plots(sources, docs):
        plot.write_text(page.svg_text(draw(load(source)), source), encoding="utf-8")
        print(f"wrote {plot.relative_to(root)}")
    (docs / "index.html").write_text(page.page(sources, docs), encoding="utf-8")
    print(f"wrote {(docs / 'index.html').relative_to(root)}")
    return errors


def check(root: Path) -> list[str]:
    """One line for each file that is not what the JSON says."""
    errors, docs = [], root / "docs"
    for path in documents(root):
        text, name = path.read_text(encoding="utf-8"), str(path.relative_to(root))
        fresh, wrong = generated(text, name, root)
        errors += wrong
        for old, new in zip(BLOCK.finditer(text), BLOCK.finditer(fresh), strict=True):
            if old[0] != new[0]:
                errors.append(f"{name} differs from {old[2]}: type python report.py")
    sources = result_files(root)
    for plot, source, _, _ in page.plots(sources, docs):
        if not page.is_in_step(plot, source):
            errors.append(
                f"{plot.relative_to(root)} was not drawn from {source.relative_to(root)} as it is: type python report.py"
            )
    html = docs / "index.html"
    if sources and not (html.is_file() and html.read_text(encoding="utf-8") == page.page(sources, docs)):
        errors.append("docs/index.html differs from results/ and the plots: type python report.py")
    return errors


# ---- two results of the same kind -------------------------------------------------------------------------------------


def speeds(result: dict) -> dict[str, tuple[float, list[list[float]]]]:
    """{name: (tokens per step, step times by round)} of whatever has step times."""
    if result["kind"] in ("ladder", "ablate"):
        return {e["name"]: (result["sizes"]["tokens_per_step"], e["step_s"]) for e in tables.measured(result)}
    if result["kind"] == "ab":
        return {e["config"]: (e["requested"]["tokens_per_step"], e["step_s"]) for e in result["sides"]}
    if result["kind"] == "shakespeare":
        return {"config/shakespeare.py": (result["requested"]["tokens_per_step"], result["step_s"])}
    return {}


def times_as_fast(a: list[list[float]], b: list[list[float]]) -> tuple[float, float, float]:
    """(how many times as fast b is, low, high) from step times by round: Welch's 95% interval of the logarithms of the medians
    of the rounds. Where a side has one round only, of its single steps, which know nothing of the drift between rounds.
    """
    if min(len(a), len(b)) > 1:
        a, b = ([statistics.median(times) for times in rounds] for rounds in (a, b))
    else:
        a, b = ([t for times in rounds for t in times] for rounds in (a, b))
    found = tables.difference([-math.log(t) for t in a], [-math.log(t) for t in b])
    middle, low, high = (math.exp(v) if v < 700 else math.inf for v in found)  # e^700 is near the largest float
    return middle, low, high


def unlike(a: dict, b: dict) -> list[str]:
    """In what two measurements differ that moves the speed, besides the code."""
    places = (("machine", ("hardware", "threads")), ("sizes", ("batch_size", "sequence_length", "tokens_per_step", "n_layer")))
    pairs = [(key, a.get(place, {}).get(key), b.get(place, {}).get(key)) for place, keys in places for key in keys]
    return [f"{key} {x} / {y}" for key, x, y in pairs if x != y]


def compare(a: dict, b: dict, max_regression: float | None = None) -> tuple[str, bool]:
    """Two results side by side, their rungs matched by name: (text, whether B fails).

    A difference counts if it is beyond the spread: if times_as_fast()'s interval leaves out 1. With max_regression (0.03:
    three percent) B fails if a rung is slower by more than that and beyond the spread, if a rung of A was not measured in B,
    or if the two were not measured alike. Without it only what cannot be compared fails.
    """
    lines = [f"{side}: {r['kind']}, {tables.machine_line(r)}" for side, r in (("A", a), ("B", b))]
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
            tokens / statistics.median([t for times in rounds for t in times]) for tokens, rounds in (in_a[name], in_b[name])
        ]
        middle, low, high = times_as_fast(in_a[name][1], in_b[name][1])
        verdict = "FASTER" if low > 1 else "SLOWER" if high < 1 else "within the spread"
        if max_regression is not None and high < 1 and middle < 1 - max_regression:
            slow.append(name)
            verdict += f" by more than {max_regression:.3g}"
        elif max_regression is not None and low < 1 - max_regression and high >= 1:
            blurred.append(name)
        rows.append([name, *(f"{m:,.0f}" for m in medians), f"{middle:.3f} [{low:.3f}, {high:.3f}]", verdict])
    head = ["", "A tok/s", "B tok/s", "B / A [95%]", ""]
    lines += ["", tables.plain_table(tables.Table(head, rows, left=(0, 4))), ""]
    several = all(len(rounds) > 1 for found in (in_a, in_b) for _, rounds in found.values())
    of = "the medians of the rounds" if several else "single steps where there is one round: drift between rounds is unknown"
    lines.append(f"tok/s: median of all steps. Interval: Welch's 95%, of {of}.")
    if differs := unlike(a, b):
        lines.append(f"Not measured alike, so that a difference may not be the code's: {', '.join(differs)}.")
    if blurred:
        lines.append(f"Too noisy to see a loss of {max_regression:.3g}: {', '.join(blurred)}; more --rounds would.")
    if max_regression is None:
        return "\n".join(lines), False
    missing = [name for name in in_a if name not in in_b]
    reasons = [f"slower: {', '.join(slow)}"] * bool(slow) + [f"not in B: {', '.join(missing)}"] * bool(missing)
    reasons += ["not measured alike"] * bool(differs)
    return "\n".join([*lines, f"FAILED: {'; '.join(reasons)}." if reasons else "passed"]), bool(reasons)


# ---- the command line -------------------------------------------------------------------------------------------------


def read_log(path: Path) -> tuple[list[dict], int]:
    """(records of a log.jsonl, how many lines are damaged): a run that is killed while it writes leaves half a line."""
    records, damaged = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            damaged += 1
            continue
        if isinstance(record, dict):
            records.append(record)
    return records, damaged


def draw_run(run: Path) -> list[str]:
    """Draw a run's curves beside its log."""
    records, damaged = read_log(run / "log.jsonl")
    if not any("loss" in r or "val_loss" in r for r in records):
        return [f"{run}/log.jsonl holds no loss yet"]
    page.plot_curves(records, run.resolve().name, run / "curves.png")
    print(f"wrote {run / 'curves.png'}" + (f" ({damaged} damaged line(s) of log.jsonl left out)" if damaged else ""))
    return []


def main(argv: list[str], root: Path = Path(__file__).parent) -> None:
    """root: the folder of README.md, results/ and docs/."""
    try:
        if argv in ([], ["--check"]):
            errors = check(root) if argv else write(root)
        elif len(argv) == 1 and (Path(argv[0]) / "log.jsonl").is_file():
            errors = draw_run(Path(argv[0]))
        elif argv in (["-h"], ["--help"]):
            return print(__doc__.strip())
        else:
            errors = [
                f"{' '.join(argv)} is no run: type python report.py, python report.py --check, or python report.py out/<run>"
            ]
    except ValueError as e:
        errors = [str(e)]
    except ModuleNotFoundError as e:
        errors = [f"drawing needs {e.name}: type pip install {e.name}"]
    for line in dict.fromkeys(errors):  # a missing file once, however many blocks show it
        print(f"error: {line}", file=sys.stderr)
    if errors:
        sys.exit(1 if argv in ([], ["--check"]) else 2)


if __name__ == "__main__":
    main(sys.argv[1:])
