"""Escapes texts for Markdown pages: names of classes, files, models and data sets may contain any character."""

import re
from collections.abc import Iterable

from infra.errors import one_line

MARKUP_IN_LINE = r"[\\`*\[\]<|~$]|&(?=#?\w+;)|(?<![^\W_])_|_(?![^\W_])"
"""Characters that CommonMark, GitHub's tables and strikethrough, or mathematics in a page would read as markup."""

MARKUP_AT_LINE_START = r"^(?:[-+>#=]|\d+(?=[.)]))"
"""The same at the start of a line. A table's cell does not start a line."""

ALIGN = {"l": ":--", "c": ":-:", "r": "--:"}


def plain(text: str, markup: str = f"{MARKUP_IN_LINE}|{MARKUP_AT_LINE_START}") -> str:
    """Returns Markdown that shows a text literally, on one line of a paragraph, list or table cell.

    Backslashes escape markup: CommonMark 0.31, section 2.4.
    """
    return re.sub(markup, _escaped, one_line(re.sub(r"[\x00-\x1f\x7f]", " ", text)))


class Markup(str):
    """Markdown that `table` does not escape."""


def table(head: Iterable[str], rows: Iterable[Iterable[str | int]], align: str) -> list[str]:
    """Returns the lines of a table. Cells show their texts literally, except for `Markup`.

    Args:
        align: `l`, `c` or `r` per column.
    """
    first, *others = (
        "".join(f"| {_cell(each)} " if each != "" else "| " for each in row) + "|" for row in (head, *rows)
    )
    return [first, f"|{'|'.join(map(ALIGN.__getitem__, align))}|", *others]


def _cell(content: str | int) -> str:
    if isinstance(content, int):
        return f"{content:,}"
    return content if isinstance(content, Markup) else plain(content, MARKUP_IN_LINE)


def _escaped(found: re.Match[str]) -> str:
    # A number matches where it would start a list; the character after it is escaped.
    return f"{found[0]}\\" if found[0].isdigit() else f"\\{found[0]}"


def shown(line: str) -> str:
    """Returns the text that an escaped line shows, without emphasis marks and backslashes."""
    return re.sub(r"\\([!-/:-@\[-`{-~])|\*\*", r"\1", line)


def accuracy_and_gain(accuracy: float, gain: float | None) -> str:
    """Returns `accuracy 93.11%, +0.42 points against the champion`; without the points if there was no comparison."""
    return f"accuracy {accuracy:.2%}" + ("" if gain is None else f", {100 * gain:+.2f} points against the champion")
