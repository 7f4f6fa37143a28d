"""Reads flat configurations from `--set key=value`; this module loads pydantic only."""

from collections.abc import Iterable
from typing import TypeVar

from pydantic import ValidationError

from cnn.config.base import Config
from infra.errors import UsageError
from tasks.config.plain_yaml import read_yaml

Flat = TypeVar("Flat", bound=Config)


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
        values[key.strip().removeprefix(section)] = read_yaml(text, f"--set {setting}: the value")
    try:
        return model.model_validate(values)
    except ValidationError as error:
        detail = error.errors()[0]
        keys = ", ".join(model.model_fields)
        raise UsageError(f"--set {'.'.join(map(str, detail['loc']))}: {detail['msg']}; the keys: {keys}") from None
