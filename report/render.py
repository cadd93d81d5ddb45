"""Blocks (tables, paragraphs, quotes) as text for a terminal and as Markdown. The page's HTML is made in page.html.j2."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """A table. Columns named in `left` are aligned left, the others right."""

    head: list[str]
    rows: list[list[str]]
    left: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Quote:
    """Text that is shown as it is, line by line."""

    text: str


Block = Table | str | Quote


def indented(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines())


def text_table(table: Table) -> str:
    """A table for a terminal."""
    everything = [table.head, *table.rows]
    widths = [max(len(row[i]) for row in everything) for i in range(len(table.head))]
    lines = []
    for row in [table.head, ["-" * w for w in widths], *table.rows]:
        cells = [c.ljust(w) if i in table.left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def text(blocks: list[Block]) -> str:
    """Blocks for a terminal."""
    how = {Table: text_table, str: lambda s: s.replace("**", ""), Quote: lambda q: indented(q.text)}
    return "\n\n".join(how[type(block)](block) for block in blocks)


def in_markdown(text: str) -> str:
    """A cell or a paragraph. What came from JSON must not become markup or a link, nor end a generated block or a cell."""
    text = re.sub(r"\s+", " ", text).replace("&", "&amp;").replace("<", "&lt;")
    return text.replace("|", "\\|").replace("](", "]\\(")


def markdown_table(table: Table) -> str:
    rule = ["---" if i in table.left else "---:" for i in range(len(table.head))]
    rows = [rule if row is rule else [in_markdown(c) for c in row] for row in [table.head, rule, *table.rows]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def markdown(blocks: list[Block]) -> str:
    """Blocks as Markdown."""
    how = {
        Table: markdown_table,
        str: in_markdown,
        Quote: lambda q: indented(q.text.replace("<!--", "< !--")),  # would end the generated block
    }
    return "\n\n".join(how[type(block)](block) for block in blocks)
