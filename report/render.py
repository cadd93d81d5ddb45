"""Blocks (tables, paragraphs, quotes) as text for a terminal and as Markdown. The page's HTML is made in page.html.j2."""

import re
import shutil
import textwrap
from dataclasses import dataclass
from itertools import zip_longest


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


def text_table(table: Table, width: int = 0) -> str:
    """A table for a terminal of so many columns (0: this one). If it is too wide, its heads are wrapped, then its text; columns
    that still have no room follow below in tables of their own, which begin with the first column again.
    """
    width = width or shutil.get_terminal_size().columns
    ways = [as_lines(table, most) for most in (None, width, width // 2, width // 3, width // 4)]
    texts = []
    for columns in ways:
        groups = side_by_side(columns, width)
        parts = [laid_out([columns[i] for i in group], [i in table.left for i in group]) for group in groups]
        too_wide = any(len(line) > width for part in parts for line in part.splitlines())
        texts.append((too_wide, len(parts), "\n\n".join(parts)))
    return min(texts, key=lambda found: found[:2])[2]  # of equal ones the least wrapped


def as_lines(table: Table, most: int | None) -> list[list[list[str]]]:
    """For each column its head and its cells as lines: text of at most `most` letters, heads hardly wider than their numbers.
    None: nothing is wrapped.
    """
    columns = []
    for i, cells in enumerate(zip(table.head, *table.rows, strict=True)):
        room = most if i in table.left else max(8, *map(len, cells[1:]), 8)
        how = dict(break_long_words=False, break_on_hyphens=False)
        columns.append([(textwrap.wrap(cell, room, **how) if room and most else []) or [cell] for cell in cells])
    return columns


def width_of(column: list[list[str]]) -> int:
    return max(len(line) for cell in column for line in cell)


def side_by_side(columns: list[list[list[str]]], width: int) -> list[list[int]]:
    """Which columns stand in each of the tables that a terminal has room for: the first in all of them."""
    groups, widths = [[0]], [width_of(column) for column in columns]
    for i in range(1, len(columns)):
        if len(groups[-1]) > 1 and sum(widths[k] + 2 for k in groups[-1]) + widths[i] > width:
            groups.append([0])
        groups[-1].append(i)
    return groups


def laid_out(columns: list[list[list[str]]], left: list[bool]) -> str:
    """Columns of cells, each of them lines, side by side, with a rule under the head."""
    widths, lines = [width_of(column) for column in columns], []
    for cells in zip(*([column[0], ["-" * w], *column[1:]] for column, w in zip(columns, widths, strict=True)), strict=True):
        for row in zip_longest(*cells, fillvalue=""):
            found = [c.ljust(w) if is_left else c.rjust(w) for c, w, is_left in zip(row, widths, left, strict=True)]
            lines.append("  ".join(found).rstrip())
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
