"""Fixtures for flows: one whole training per session, which several tests check, and helpers to run more."""

import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flows.summary import Summary
from infra.settings import Settings
from tasks.config.run import RunConfig
from tests.flows.program import Done, NextTraining, Program
from tests.flows.requests_made import counting

Convoy = Callable[..., Done]

CONFIG = RunConfig.model_validate(
    {
        "dataset": "digits",
        "name": "whole-flow",
        "network": {"width": 4},
        "epochs": 4,
        "batch_size": 60,
        "ranks": 2,
        "data": {"limit": 600},
        "augment": {"shift": 0},
        "serving": {"http": False},
        "promote": True,
    }
)
"""Configuration of `trained`: small, but with every part of a training, such as several lanes per rank."""


@pytest.fixture(scope="session")
def requests_made() -> Counter[tuple[str, str]]:
    """Counts the requests of `trained` to the servers; empty before it."""
    return Counter()


@pytest.fixture(scope="session")
def trained(stack: object, quiet_prefect: None, requests_made: Counter[tuple[str, str]]) -> Summary:
    """A whole training on two ranks."""
    from flows.train import train_flow

    with counting() as found:
        summary = train_flow(CONFIG)
    requests_made.update(found)
    return summary


@pytest.fixture
def next_training(stack: object, settings: Settings) -> NextTraining:
    return NextTraining(settings)


@pytest.fixture
def program(stack: object, tmp_path: Path) -> Iterator[Callable[..., Program]]:
    """Starts `convoy` as a process; what still runs at the end of the test is killed."""
    started: list[Program] = []

    def start(*arguments: str, **code: str) -> Program:
        started.append(Program(*arguments, folder=tmp_path, **code))
        return started[-1]

    yield start
    for each in started:
        each.end()


@pytest.fixture
def convoy(capfd: pytest.CaptureFixture[str], quiet_prefect: None) -> Iterator[Convoy]:
    """Runs `convoy` in this process, where everything is imported; changes to the process are undone."""
    from flows.cli import app

    environment = dict(os.environ)
    handlers = {name: list(logging.getLogger(name).handlers) for name in ("prefect.flow_runs", "prefect.task_runs")}

    def run(*arguments: str) -> Done:
        capfd.readouterr()
        arguments_before, sys.argv = sys.argv, ["convoy", *arguments]
        status = 0
        try:
            app.main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            sys.argv = arguments_before
        captured = capfd.readouterr()
        return Done(status, captured.out, captured.err)

    yield run
    os.environ.clear()
    os.environ.update(environment)
    for name, before in handlers.items():
        logging.getLogger(name).handlers[:] = before


@pytest.fixture(scope="session")
def quiet_prefect(stack: object) -> None:
    """Silences Prefect's own console log, as `convoy` does before it loads Prefect."""
    os.environ["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] = "CRITICAL"
    from prefect.context import refresh_global_settings_context
    from prefect.logging.configuration import setup_logging

    refresh_global_settings_context()
    setup_logging()
