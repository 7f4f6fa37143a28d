"""Escapes texts for Markdown pages: names of classes, files, models and data sets may hold anything."""

import re
from collections.abc import Iterable

from infra.errors import one_line

IN_LINE = r"[\\`*\[\]<|~$]|&(?=#?\w+;)|(?<![^\W_])_|_(?![^\W_])"
"""What CommonMark, GitHub's tables and strikethrough, or a page's mathematics would take for more than a character."""

AT_BEGINNING = r"^(?:[-+>#=]|\d+(?=[.)]))"
"""The same, where a line begins; a cell begins none."""

ALIGN = {"l": ":--", "c": ":-:", "r": "--:"}


def plain(text: str, meaning: str = f"{IN_LINE}|{AT_BEGINNING}") -> str:
    """Returns Markdown that shows a text as it is, on one line: in a paragraph, a list or a cell of a table.

    See CommonMark 0.31, section 2.4, for what a backslash does.
    """
    return re.sub(meaning, _escaped, one_line(re.sub(r"[\x00-\x1f\x7f]", " ", text)))


class Markup(str):
    """Markdown that `table` leaves as it is."""


def table(head: Iterable[str], rows: Iterable[Iterable[str | int]], align: str) -> list[str]:
    """Returns the lines of a table whose cells show their texts as they are, but for `Markup`.

    Args:
        align: `l`, `c` or `r` for each column.
    """
    first, *others = (
        "".join(f"| {_cell(each)} " if each != "" else "| " for each in row) + "|" for row in (head, *rows)
    )
    return [first, f"|{'|'.join(map(ALIGN.__getitem__, align))}|", *others]


def _cell(content: str | int) -> str:
    if isinstance(content, int):
        return f"{content:,}"
    return content if isinstance(content, Markup) else plain(content, IN_LINE)


def _escaped(found: re.Match[str]) -> str:
    # Of a number that would begin a list, the dot is what is escaped, and that is the next character.
    return f"{found[0]}\\" if found[0].isdigit() else f"\\{found[0]}"


def shown(line: str) -> str:
    """Returns what such a line shows, without marks of emphasis and backslashes."""
    return re.sub(r"\\([!-/:-@\[-`{-~])|\*\*", r"\1", line)
