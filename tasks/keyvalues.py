"""Reads YAML, and flat configurations from `--set key=value`; this module loads pydantic only."""

from collections.abc import Iterable
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from cnn.config import Config
from infra.errors import UsageError

Flat = TypeVar("Flat", bound=Config)


def parse_yaml(text: str) -> Any:
    """Returns the value that a text has as YAML.

    Raises:
        yaml.YAMLError: it is not valid. PyYAML has other errors for a date that does not exist, a tag that does not
            fit its value, and too many brackets.
    """
    try:
        return yaml.safe_load(text)
    except (ValueError, AttributeError, RecursionError) as error:
        raise yaml.YAMLError(str(error)) from None


def from_settings(model: type[Flat], settings: Iterable[str], *, example: str, section: str = "") -> Flat:
    """The defaults, changed by `key=value` texts.

    Args:
        example: a setting that could be meant, for messages.
        section: what keys may begin with, since they do so in a whole configuration: `gate.`.

    Raises:
        UsageError: a key or value that cannot be used.
    """
    values = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise UsageError(f"--set {setting}: write key=value, for example --set {example}")
        try:
            values[key.strip().removeprefix(section)] = parse_yaml(text)
        except yaml.YAMLError:
            raise UsageError(f"--set {setting}: the value is not valid YAML") from None
    try:
        return model.model_validate(values)
    except ValidationError as error:
        detail = error.errors()[0]
        keys = ", ".join(model.model_fields)
        raise UsageError(f"--set {'.'.join(map(str, detail['loc']))}: {detail['msg']}; the keys: {keys}") from None
