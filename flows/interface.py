"""The functions that Python programs get by `import convoy`. They do what the commands of the same names do.

Each starts the local servers that it needs, and puts their addresses into the environment, as its command does. Where a
command would end with an error line and a status, it raises the error, which has that status as `exit_status`:
UsageError or InputError (2), Refused or another GateRefused (3), ServiceError (1).
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.cli.console import as_known_error, configuration_file
from flows.cli.in_process import check_before_servers, run_training
from flows.cli.models import compare_named, promote_named
from flows.cli.prediction import write_predictions
from flows.summary import Summary
from infra.errors import UsageError
from infra.machine import stopping
from tasks.config.deployment import load_project
from tasks.config.gates import load_gate
from tasks.config.run import RunConfig, Step, with_network_options

if TYPE_CHECKING:
    from infra.tracking.promotion_history import Promotion
    from tasks.prediction.predict import Predictions
    from tasks.release.quality.verdict import Verdict

PathOrText = str | os.PathLike[str]


@contextmanager
def _known_errors() -> Iterator[None]:
    """Raises errors of Prefect's client and of a full disk as those that the commands print, Ctrl-C as Python does.

    A signal that came after a flow's last check reaches the program's own handler afterwards.
    """
    stopping.forget()
    try:
        yield
    except stopping.Stopped:
        raise KeyboardInterrupt from None
    except Exception as raised:
        error = as_known_error(raised)
        if error is raised:
            raise
        raise error from raised
    finally:
        stopping.deliver_late()


def _steps(refresh: Iterable[str]) -> frozenset[Step]:
    try:
        return frozenset(map(Step, refresh))
    except ValueError as error:
        raise UsageError(f"refresh: {error}; known are {', '.join(Step)}") from None


@_known_errors()
def train(
    config: PathOrText | None = None, *, recipe: str | None = None, refresh: Iterable[str] = (), **keys: Any
) -> Summary:
    """Trains a network, evaluates and registers it, and makes it the champion if it passes its gates.

    Args:
        config: YAML file of keys; by default `convoy.yaml`, if the working folder has it. `/dev/null` is no file.
        recipe: named configuration to build on.
        refresh: steps (`download`, `preprocess`) to repeat although their output exists.
        keys: keys of the configuration, sections as dictionaries: `epochs=3, data={"image_size": 64}`.

    Raises:
        UsageError, InputError: the configuration or the data cannot be used.
        Refused: a gate refused; `summary` has the result.
        ServiceError: a server failed.
    """
    read = _read(config, recipe, keys)
    check_before_servers(read)
    return run_training(read, _steps(refresh))


@_known_errors()
def retrain(
    config: PathOrText | None = None,
    *,
    recipe: str | None = None,
    force: bool = False,
    refresh: Iterable[str] = (),
    **keys: Any,
) -> Summary:
    """Trains like `train` if data, code, configuration or lock file have changed since the champion.

    It runs the flow `retrain` in this process; it needs neither a deployment nor a worker, unlike the command.

    Args:
        force: train although nothing has changed.

    Returns:
        The summary, with the status `unchanged` if there was no reason to train, and the reason.

    Raises:
        UsageError, InputError, Refused, ServiceError: as `train`.
    """
    read = _read(config, recipe, keys)
    check_before_servers(read)
    return run_training(read, _steps(refresh), only_if_changed=True, force=force)


@_known_errors()
def predict(model: str, inputs: PathOrText | Sequence[PathOrText], out: PathOrText) -> "Predictions":
    """Writes a table of images with their classes and probabilities.

    Args:
        model: `name` (its champion), `name@alias` or `name/version`.
        inputs: files, folders, `s3://` addresses.
        out: the table; `.parquet`, `.csv` or `.json`, a path or an `s3://` address.

    Returns:
        Numbers of images and of unreadable ones, and how often each class was predicted.

    Raises:
        UsageError: no such model or input, or no readable image.
        ServiceError: a server failed.
    """
    given = [inputs] if isinstance(inputs, str | os.PathLike) else inputs
    return write_predictions(model, [os.fspath(each) for each in given], os.fspath(out))


@_known_errors()
def compare(a: str, b: str, **conditions: Any) -> "Verdict":
    """Compares two versions on the test split of A's dataset, as the quality gate does; promotes nothing.

    Args:
        a: the challenger: `name/version`, `name@alias`, or `name` for its champion.
        b: the version to compare it with.
        conditions: keys of the quality gate, in place of those of A's training: `margin=0.01`.

    Raises:
        UsageError: no such version, or a wrong condition.
        ServiceError: a server failed or does not run; none is started.
    """
    return compare_named(a, b, load_gate(_as_settings(conditions)))


@_known_errors()
def promote(
    name: str,
    version: str | int,
    *,
    judge: bool = False,
    force: bool = False,
    reason: str = "",
    **conditions: Any,
) -> "Promotion":
    """Makes a version the champion, if it passed its gates against the present one.

    Args:
        name: name of the model.
        version: its number, or `@alias`.
        judge: score it against the present champion first.
        force: override the gates; needs a reason, which the history keeps.
        conditions: keys of the quality gate, in place of those of the version's training: `margin=0.01`; with any, it
            is scored as by `judge`.

    Returns:
        The new entry of the model's history.

    Raises:
        UsageError: no such version, a wrong condition, or it is the champion already.
        GateRefused: a gate has not passed it.
        ServiceError: a server failed, or another promotion came first.
    """
    gate = load_gate(_as_settings(conditions)) if judge or conditions else None
    return promote_named(name, str(version), gate, force, reason)


def _read(config: PathOrText | None, recipe: str | None, keys: dict[str, Any]) -> RunConfig:
    file = configuration_file(None if config is None else Path(config))
    options = {key: os.fspath(value) if isinstance(value, os.PathLike) else value for key, value in keys.items()}
    return with_network_options(load_project(file, (), options, recipe=recipe).run)


def _as_settings(conditions: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in conditions.items()]
