"""Checks names of models, and quotes texts, for MLflow's tracking server and registry. Imports nothing slow."""

import re

from infra.errors import UsageError

LONGEST = 256  # characters; the width of MLflow's column


def model_name_fault(name: str) -> str:
    """Returns why MLflow cannot keep a model of this name, or find it again; empty if it can."""
    if not name.strip():
        return "it is empty"
    if found := re.search(r"[/:\x00-\x1f\x7f]", name):
        return f"MLflow refuses `/`, `:` and control characters ({found[0]!r})"
    if "@" in name:
        return "what follows `@` is taken for an alias"
    if name != name.strip():
        return "it begins or ends with a space"
    if fault := _filter_fault(name):
        return fault
    if name in (".", ".."):
        return "it is the name of a folder"
    if len(name) > LONGEST:
        return f"it has more than {LONGEST} characters"
    return ""


def filter_of(**equal: str) -> str:
    """Returns a filter for MLflow's searches: every attribute or tag has its value.

    Args:
        equal: values by name; a tag's name is `tags.NAME`, which takes `**{...}`.

    Raises:
        UsageError: a value cannot be written in a filter.
    """
    return " and ".join(f"{_column(name)} = {_quoted(value)}" for name, value in equal.items())


def _column(name: str) -> str:
    return f"tags.`{name.removeprefix('tags.')}`" if name.startswith("tags.") else name


def _quoted(value: str) -> str:
    if fault := _filter_fault(value):
        raise UsageError(f"{value!r} cannot be searched for in MLflow: {fault}")
    quote = '"' if "'" in value else "'"
    return f"{quote}{value}{quote}"


def _filter_fault(value: str) -> str:
    """Why a filter cannot hold a text: there are two kinds of quotes, and no way to escape one."""
    if "'" in value and '"' in value:
        return "it may hold ' or \", but not both"
    return "it may not end with a backslash" if value.endswith("\\") else ""
