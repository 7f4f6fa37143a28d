"""Reads YAML with the plain values of version 1.2, and refuses duplicate keys. Imports nothing slow."""

import re
from collections.abc import Hashable
from typing import Any

import yaml

from infra.errors import UsageError

_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_YAML_1_1 = {"int", "float", "timestamp"}
"""Types for which YAML 1.1, which PyYAML reads, has surprising notations: `010` is 8, and `12:30` is 750."""


class _Loader(yaml.SafeLoader):
    """Reads numbers as decimal or hexadecimal, and dates as texts."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - of the base class
        first: [(tag, pattern) for tag, pattern in each if tag.rpartition(":")[2] not in _YAML_1_1]
        for first, each in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def whole_mapping(self, node: yaml.MappingNode) -> dict[Hashable, Any]:
        """Returns a mapping with all its contents, so that a mapping that contains itself is an error.

        Raises:
            UsageError: a key is there twice; YAML would drop the first value.
        """
        lines: dict[str, int] = {}
        for key, _ in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if key.tag != "tag:yaml.org,2002:merge" and name in lines:
                raise UsageError(f"{name} is there twice (lines {lines[name]} and {line}); keep one")
            lines[name] = line
        return self.construct_mapping(node, deep=True)

    def whole_number(self, node: yaml.ScalarNode) -> int:
        """Reads a decimal (also `010`) or hexadecimal number."""
        return int(node.value, 16 if "x" in node.value else 10)


_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.whole_mapping)
_Loader.add_constructor(_INT, _Loader.whole_number)
_Loader.add_implicit_resolver(_INT, re.compile(r"[-+]?[0-9]+$|0x[0-9a-fA-F]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)


def read_yaml(text: str, invalid: str) -> Any:
    """Returns the value of a YAML text.

    Args:
        invalid: the text's name, with which error messages begin.

    Raises:
        UsageError: the text is no YAML, gives a key twice, or contains itself.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None) if "\n" in text.strip() else None
        raise UsageError(f"{invalid} is not valid YAML" + (f" (line {where.line + 1})" if where else "")) from None
    except RecursionError:
        raise UsageError(f"{invalid} is not valid YAML: it is nested too deep, or contains itself") from None
    except UsageError as error:
        raise UsageError(f"{invalid}: {error}") from None
    except (ValueError, AttributeError):  # raised by PyYAML if a tag does not fit its value
        raise UsageError(f"{invalid} is not valid YAML") from None
