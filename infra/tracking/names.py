"""Checks model names and quotes texts for MLflow's filters. Imports nothing slow."""

import re
from collections.abc import Sequence

from infra.errors import UsageError

NAME_CHARACTERS = 256  # the width of MLflow's column


def model_name_fault(name: str) -> str:
    """Returns why MLflow cannot store a model of this name, or find it again; empty if it can."""
    if not name.strip():
        return "it is empty"
    if found := re.search(r"[/:\x00-\x1f\x7f]", name):
        return f"MLflow refuses `/`, `:` and control characters ({found[0]!r})"
    if "@" in name:
        return "text after `@` would be read as an alias"
    if name != name.strip():
        return "it begins or ends with a space"
    if name in (".", ".."):
        return "it is the name of a folder"
    if len(name) > NAME_CHARACTERS:
        return f"it has more than {NAME_CHARACTERS} characters"
    return _filter_fault(name)


def filter_of(**equal: str | Sequence[str]) -> str:
    """Returns a filter for MLflow's searches that requires each attribute or tag to have its value, or one of several.

    Args:
        equal: values by name; a tag is named `tags.NAME`, which needs `**{...}`.

    Raises:
        UsageError: a value cannot be written in a filter.
    """
    return " and ".join(f"{_column(name)} {_condition(value)}" for name, value in equal.items())


def _condition(value: str | Sequence[str]) -> str:
    return f"= {_quoted(value)}" if isinstance(value, str) else f"IN ({', '.join(map(_quoted, value))})"


def _column(name: str) -> str:
    return f"tags.`{name.removeprefix('tags.')}`" if name.startswith("tags.") else name


def _quoted(value: str) -> str:
    if fault := _filter_fault(value):
        raise UsageError(f"{value!r} cannot be searched for in MLflow: {fault}")
    quote = '"' if "'" in value else "'"
    return f"{quote}{value}{quote}"


def _filter_fault(value: str) -> str:
    """Returns why a filter cannot contain a text: it knows two kinds of quotes, and no escapes; empty if it can."""
    if "'" in value and '"' in value:
        return "it contains both ' and \""
    return "it ends with a backslash" if value.endswith("\\") else ""
