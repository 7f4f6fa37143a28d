"""Reads configurations from `--set key=value`, and explains errors in them. Importing this loads pydantic only."""

import difflib
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from cnn.config.base import Config
from cnn.config.networks import NETWORKS
from infra.errors import UsageError
from tasks.config.plain_yaml import read_yaml

Flat = TypeVar("Flat", bound=Config)

_SHORT = reprlib.Repr()  # for given values, which may be of any size
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, 80, 80


def read_settings(settings: Iterable[str], values: dict[str, Any], *, example: str) -> None:
    """Puts `key=value` texts into `values`; a dot separates section and key, the value is read as YAML.

    Args:
        example: a valid setting, for error messages.

    Raises:
        UsageError: a text is not of this form.
    """
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise UsageError(f"--set {setting}: write key=value, for example --set {example}")
        section = values
        *path, last = key.strip().split(".")
        for name in path:
            section = section.setdefault(name, {})
            if not isinstance(section, dict):
                raise UsageError(f"--set {setting}: {name} is a value, not a section")
        section[last] = read_yaml(text, f"--set {setting}: the value")


def from_settings(model: type[Flat], settings: Iterable[str], *, example: str, section: str = "") -> Flat:
    """Returns the defaults, changed by `key=value` texts.

    Args:
        example: as `read_settings`.
        section: optional prefix of the keys, as in a whole configuration: `gate.`.

    Raises:
        UsageError: a key or value is invalid.
    """
    values: dict[str, Any] = {}
    read_settings((setting.strip().removeprefix(section) for setting in settings), values, example=example)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        message, keys = explain(error, model, values), ", ".join(model.model_fields)
        raise UsageError(message if keys in message else f"{message} (the keys: {keys})") from None


def explain(error: ValidationError, model: type[BaseModel], values: Mapping[str, Any]) -> str:
    """Returns one line that explains the error of each key, with the nearest valid key for an unknown one."""
    complaints = []
    for detail in error.errors(include_url=False):
        path = [str(part) for part in detail["loc"]]
        key = ".".join(path)
        if detail["type"] == "extra_forbidden":
            complaints.append(f"unknown key {key!r}; {_nearest(path, model, values)}")
        else:
            message = detail["msg"].removeprefix("Value error, ")
            message = message[:1].lower() + message[1:]
            given = "" if not path or detail["type"] == "value_error" else f" (given: {_SHORT.repr(detail['input'])})"
            if detail["type"] == "string_type" and isinstance(detail["input"], int | float):
                given += "; in YAML, put it into quotes"
            complaints.append(f"{key}: {message}{given}" if key else message)
    return "; ".join(complaints)


def _nearest(path: list[str], model: type[BaseModel], values: Mapping[str, Any]) -> str:
    """Suggests the key that was probably meant: the nearest in the same section, or else in all sections."""
    keys = list(known_keys(model, values.get("model")))
    key = ".".join(path)
    others = [name for name, each in NETWORKS.items() if path[-1] in each.options.model_fields]
    if path[0] == "network" and others:
        return f"{others[0]} has it: --model {others[0]}"
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    if not close:
        by_last = {known.rsplit(".", 1)[-1]: known for known in reversed(keys)}
        close = [by_last[last] for last in difflib.get_close_matches(path[-1], by_last, n=1, cutoff=0.8)]
    return f"did you mean {close[0]!r}?" if close else f"there are {', '.join(keys)}"


def known_keys(model: type[BaseModel], network: object = None) -> Iterable[str]:
    """Yields every key of a configuration, in dotted form."""
    for name, field in model.model_fields.items():
        candidates = (field.annotation, *get_args(field.annotation))
        section = next((c for c in candidates if isinstance(c, type) and issubclass(c, Config)), None)
        if name == "network" and (found := NETWORKS.get(str(network or model.model_fields["model"].default))):
            section = found.options
        if section is None:
            yield name
        else:
            yield from (f"{name}.{key}" for key in section.model_fields)
