"""The generated blocks of README.md and docs/, the plots and the page: make them from results/, or check that they match.

A generated block of a Markdown file stands between `<!-- begin results/<hardware>/x.json -->` and `<!-- end -->`; words behind
the path choose a part (a rung's name, a check's, `summary`, `numbers`).
"""

import re
from pathlib import Path

from report import kinds, page, plots, results

# Its text never reaches over the begin of the next: a forgotten end must not swallow what follows
BLOCK = re.compile(r"(<!-- begin (\S+?\.json)((?: +\S+)*?) +-->\n)((?:(?!<!-- begin ).)*?)(<!-- end -->)", re.DOTALL)


def documents(root: Path) -> list[Path]:
    """The Markdown files that may hold generated blocks."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def result_files(root: Path) -> list[Path]:
    """results/<hardware>/<kind>.json, of the kinds that are known, without trials. ValueError if one is damaged."""
    found = []
    for path in sorted(p for p in (root / "results").glob("*/*.json") if ".trial" not in p.name):
        try:
            result = results.load(path)
            if result.get("kind") in kinds.KINDS:
                kinds.blocks(result)
                found.append(path)
        except results.DAMAGED as e:
            raise ValueError(f"{path.relative_to(root)} is damaged: {type(e).__name__}: {e}") from None
    return found


def generated(text: str, name: str, root: Path) -> tuple[str, list[str]]:
    """(a Markdown text with each block made again from its file, one line for each block that cannot be made)."""
    errors: list[str] = []

    def block(match: re.Match) -> str:
        source, words = root / match[2], match[3].split()
        try:
            return f"{match[1]}{kinds.as_markdown(results.load(source), words)}\n{match[5]}"
        except FileNotFoundError:
            maker = "tests/faults.py" if source.stem == "faults" else f"bench.py {source.stem}"
            errors.append(f"{match[2]}, which generated blocks show, does not exist: run python {maker}")
        except results.DAMAGED as e:
            errors.append(f"{name} cannot show {match[2]}{match[3]}: {type(e).__name__}: {e}")
        return match[0]

    fresh = BLOCK.sub(block, text)
    if text.count("<!-- begin ") != len(BLOCK.findall(text)):
        errors.append(f"{name} has a <!-- begin … --> that names no .json, or has no <!-- end -->")
    return fresh, errors


def write(root: Path) -> list[str]:
    """Make blocks, plots and page. What could not be made, one line each; the rest is made nevertheless."""
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
    for plot, source, draw, _ in plots.plots(sources, docs):
        plot.write_text(plots.svg_text(draw(results.load(source)), source), encoding="utf-8")
        print(f"wrote {plot.relative_to(root)}")
    (docs / "index.html").write_text(page.page(sources, docs), encoding="utf-8")
    print(f"wrote {(docs / 'index.html').relative_to(root)}")
    return errors


def check(root: Path) -> list[str]:
    """One line for each file that does not match the JSON."""
    errors, docs = [], root / "docs"
    for path in documents(root):
        text, name = path.read_text(encoding="utf-8"), str(path.relative_to(root))
        fresh, wrong = generated(text, name, root)
        errors += wrong
        for old, new in zip(BLOCK.finditer(text), BLOCK.finditer(fresh), strict=True):
            if old[0] != new[0]:
                errors.append(f"{name} differs from {old[2]}: run python -m report")
    sources = result_files(root)
    for plot, source, _, _ in plots.plots(sources, docs):
        if not plots.is_in_step(plot, source):
            errors.append(
                f"{plot.relative_to(root)} was not drawn from {source.relative_to(root)} as it is now: run python -m report"
            )
    html = docs / "index.html"
    if sources and not (html.is_file() and html.read_text(encoding="utf-8") == page.page(sources, docs)):
        errors.append("docs/index.html differs from results/ and the plots: run python -m report")
    return errors
