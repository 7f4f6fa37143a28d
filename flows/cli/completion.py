"""What the shell may complete: data sets, recipes, networks and keys. Each function gets the word so far.

Where nothing here fits, the shell completes names of files.
"""

from collections.abc import Iterable

from infra.sources.entries import CATALOGUE
from tasks.config.run import recipes


def datasets(incomplete: str) -> list[str]:
    """Returns names of the catalogue."""
    return _beginning(incomplete, (entry.name for entry in CATALOGUE))


def recipe_names(incomplete: str) -> list[str]:
    """Returns names of recipes."""
    return _beginning(incomplete, recipes())


def networks(incomplete: str) -> list[str]:
    """Returns names of networks; of those before a `/`, such as timm's thousand, only that first part."""
    from tasks.config.keys import network_names

    names = network_names()
    if "/" not in incomplete:
        names = list(dict.fromkeys(name[: name.find("/") + 1] or name for name in names))
    return _beginning(incomplete, names)


def settings(incomplete: str) -> list[str]:
    """Returns keys as `KEY=`."""
    from tasks.config.deployment import ProjectConfig
    from tasks.config.key_values import known_keys

    return _beginning(incomplete, (f"{key}=" for key in known_keys(ProjectConfig)))


def _beginning(incomplete: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
