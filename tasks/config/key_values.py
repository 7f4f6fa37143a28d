"""Reads configurations from `--set key=value`, and explains errors in them. Importing this loads pydantic only."""

import difflib
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from cnn.config.base import Config
from cnn.config.networks import is_network
from infra.errors import UsageError
from tasks.config.keys import sections_of, users_of_options
from tasks.config.plain_yaml import read_yaml

Flat = TypeVar("Flat", bound=Config)

MAX_NAMED = 20  # keys in one line
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
        put(values, key.strip(), read_yaml(text, f"--set {setting}: the value"), f"--set {setting}")


def put(values: dict[str, Any], key: str, value: Any, what: str) -> None:
    """Puts a value into nested mappings; a dot separates section and key.

    Args:
        what: the beginning of an error message.

    Raises:
        UsageError: a section is a value.
    """
    *path, last = key.split(".")
    for name in path:
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            raise UsageError(f"{what}: {name} is a value, not a section")
    values[last] = value


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
        elif detail["type"] in ("tuple_type", "list_type") and isinstance(detail["input"], str | int | float):
            complaints.append(f"{key}: give a list, such as {_SHORT.repr([detail['input']])}")
        elif detail["type"] == "model_type":
            complaints.append(f"{key} is a section; give it keys, or leave it out")  # the value may be a secret
        else:
            message = detail["msg"].removeprefix("Value error, ")
            message = message[:1].lower() + message[1:]
            says_all = not path or detail["type"] in ("value_error", "missing")
            given = "" if says_all else f" (given: {_SHORT.repr(detail['input'])})"
            if detail["type"] == "string_type" and isinstance(detail["input"], int | float):
                given += "; in YAML, put it into quotes"
            complaints.append(f"{key}: {message}{given}" if key else message)
    return "; ".join(complaints)


def _nearest(path: list[str], model: type[BaseModel], values: Mapping[str, Any]) -> str:
    """Suggests the key that was probably meant: of this configuration, or one that only other networks have."""
    network = str(values.get("model") or ("network" in model.model_fields and model.model_fields["model"].default))
    keys = list(known_keys(model, network))
    others = dict[str, list[str]]()
    for options, users in users_of_options().items() if is_network(network) else ():
        for option in options.model_fields:
            if (key := f"network.{option}") not in keys:
                others.setdefault(key, []).extend(users)
    known = [*keys, *others]
    depth = len(path)
    sections = {".".join(parts[:depth]) for parts in (key.split(".") for key in keys) if len(parts) > depth}
    siblings = {key.rpartition(".")[2]: key for key in (*known, *sections) if key.split(".")[:-1] == path[:-1]}
    by_last = {key.rpartition(".")[2]: key for key in reversed(known)}
    whole = {key: key for key in known}
    last, key = path[-1], ".".join(path)
    for wrong, names, cutoff in (
        *((last, siblings, 1.0), (last, by_last, 1.0)),
        *((last, siblings, 0.6), (last, by_last, 0.8), (key, whole, 0.8)),
    ):
        if close := difflib.get_close_matches(wrong, names, n=1, cutoff=cutoff):
            return _hint(names[close[0]], others, network)
    there = [key for key in siblings.values() if key in keys] if path[1:] else keys
    if len(there) > MAX_NAMED:
        return "`convoy config --explain` lists all keys"
    return f"there are {', '.join(there) or 'none'}"


def _hint(key: str, others: Mapping[str, list[str]], network: str) -> str:
    """Names a key, and if this run's network lacks it, a network that has it."""
    if key not in others:
        return f"did you mean {key!r}?"
    first, *more = others[key]
    which = f"network {first}" + (f" and {len(more)} more" if more else "")
    return f"{key} is a key of {which} (--model {first}); this run uses {network}"


def known_keys(model: type[BaseModel], network: object = None) -> Iterator[str]:
    """Yields every key of a configuration, in dotted form; `network` is as in `sections_of`."""
    return (key.name for section in sections_of(model, network) for key in section.keys)
