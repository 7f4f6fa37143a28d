"""Escapes texts for Markdown pages: names of classes, files, models and data sets may hold anything."""

import re

from infra.errors import one_line

MEANS_SOMETHING = re.compile(r"[\\`*\[\]<|~$]|&(?=#?\w+;)|(?<![^\W_])_|_(?![^\W_])|^(?:[-+>#=]|\d+(?=[.)]))")
"""What CommonMark, GitHub's tables and strikethrough, or a page's mathematics would take for more than a character."""


def plain(text: str) -> str:
    """Returns Markdown that shows a text as it is, on one line: in a paragraph, a list or a cell of a table.

    See CommonMark 0.31, section 2.4, for what a backslash does.
    """
    line = one_line(re.sub(r"[\x00-\x1f\x7f]", " ", text))
    return MEANS_SOMETHING.sub(_escaped, line)


def _escaped(found: re.Match[str]) -> str:
    # Of a number that would begin a list, the dot is what is escaped, and that is the next character.
    return f"{found[0]}\\" if found[0].isdigit() else f"\\{found[0]}"


def shown(line: str) -> str:
    """Returns what such a line shows, without marks of emphasis and backslashes."""
    return re.sub(r"\\([!-/:-@\[-`{-~])|\*\*", r"\1", line)
