"""Fixtures of the whole suite: one real local stack a session, in a temporary state folder, on free ports.

Tests that need only the object store ask for `s3` or `store`, ready in a second; `stack` adds the others.
"""

import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

from infra.settings import Settings
from infra.stack.endpoints import Endpoints
from infra.stack.local_stack import down, up
from infra.stack.ports import PORT_RANGE
from tests.infra.webserver import WebServer, web_server

if TYPE_CHECKING:
    from infra.sources.base import Workplace
    from infra.storage.object_store import ObjectStore

REPOSITORY = Path(__file__).parents[1]
USERS_OWN = ("AWS_", "CONVOY_", "MLFLOW_", "PREFECT_")
STOP_WHEN_ORPHANED = """
import sys
from pathlib import Path
from infra.stack.ports import PORT_RANGE
from infra.settings import Settings
from infra.stack.local_stack import down
sys.stdin.read()
down(Settings(home=Path(sys.argv[1])))
"""


def pytest_configure(config: pytest.Config) -> None:
    """Take the user's own settings away before anything is imported, and share the cores among the workers (-n).

    No test may depend on a user's settings.
    """
    before = dict(os.environ)
    for name in before:
        if name.startswith(USERS_OWN):
            del os.environ[name]
    if "gpu" not in config.getoption("markexpr", "").replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # tests take 2 and 4 ranks, whatever GPUs there are
    if workers := config.getoption("numprocesses", None):
        # Threads of PyTorch wait for each other by spinning: with more of them than cores, they do little else.
        # A worker inherits the variable; if it is set once a worker runs, some libraries have read it already.
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // workers)))

    def restore() -> None:
        os.environ.clear()
        os.environ.update(before)

    config.add_cleanup(restore)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Have SIGTERM and Ctrl-C end the whole session with its servers, not just the test that runs."""

    def stop(number: int, _: object) -> None:
        session.shouldstop = f"ended by {signal.Signals(number).name}"  # even if the test swallows what is raised
        if session.config.getoption("numprocesses", None):  # the workers (-n) run the tests
            for worker in psutil.Process().children():
                worker.terminate()
        raise KeyboardInterrupt

    for each in (signal.SIGTERM, signal.SIGINT):
        session.config.add_cleanup(partial(signal.signal, each, signal.signal(each, stop)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say which tests were left out by their marker, and how to run them."""
    if left_out := set(re.findall(r"not (\w+)", config.option.markexpr)):
        terminalreporter.section("not run, unless asked for")
        for name, why in (line.split(": ", 1) for line in config.getini("markers") if ": " in line):
            if name in left_out:
                terminalreporter.line(f"{why:60} pytest -m {name}")


class OneTraining(LoadFileScheduling):
    """Gives a worker whole files, and the files that look at the training `trained` to the same one."""

    LOOK_AT_IT = tuple(f"tests/flows/test_{name}.py" for name in ("cli", "json", "nodes", "pages", "train_flow"))

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return self.LOOK_AT_IT[0] if file in self.LOOK_AT_IT else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> OneTraining | None:
    """Have `trained` run once, not once a worker."""
    return OneTraining(config, log) if config.getoption("dist") == "loadfile" else None


def _apply(endpoints: Endpoints) -> None:
    os.environ.update(endpoints.environment())
    if context := sys.modules.get("prefect.context"):  # it read its settings when it was imported
        context.refresh_global_settings_context()


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings of the session's stack; its ports leave the default ones to the user's own stack."""
    s3, mlflow, prefect = random.sample(PORT_RANGE, 3)
    home = tmp_path_factory.mktemp("session") / ".convoy"
    return Settings(home=home, s3_port=s3, mlflow_port=mlflow, prefect_port=prefect)


@pytest.fixture(scope="session")
def _stack_ends_with_session(settings: Settings) -> Iterator[None]:
    """Stop the stack at the end, even if this process is killed: then a helper's standard input closes."""
    helper = subprocess.Popen(
        [sys.executable, "-c", STOP_WHEN_ORPHANED, str(settings.home)],
        stdin=subprocess.PIPE,
        cwd=REPOSITORY,
        start_new_session=True,
    )
    try:
        yield
    finally:
        if handlers := sys.modules.get("prefect.logging.handlers"):
            handlers.APILogHandler().flush()  # else Prefect says at the end that nobody takes its log
        down(settings)
        helper.communicate()


@pytest.fixture(scope="session")
def s3(settings: Settings, _stack_ends_with_session: None) -> Endpoints:
    """The session's object store; MLflow and Prefect may not run. `os.environ` names it from now on."""
    endpoints = up(settings, only=["seaweedfs"])
    _apply(endpoints)
    return endpoints


@pytest.fixture(scope="session")
def stack(settings: Settings, s3: Endpoints) -> Endpoints:
    """The session's object store, MLflow and Prefect. `os.environ` names them from now on."""
    endpoints = up(settings)
    _apply(endpoints)
    return endpoints


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working folder; none of its modules stays loaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    yield tmp_path
    for name, module in list(sys.modules.items()):
        found = getattr(module, "__dict__", {})
        if any(str(place).startswith(str(tmp_path)) for place in (found.get("__file__"), *found.get("__path__", ()))):
            del sys.modules[name]


@pytest.fixture
def store(s3: Endpoints) -> "Iterator[ObjectStore]":
    """An empty bucket.

    It is the same for all tests, since each bucket takes a volume of its own from SeaweedFS, whose number is bounded.
    """
    from infra.storage.object_store import ObjectStore

    store = ObjectStore.connect("test")
    yield store
    for info in list(store.list("")):
        store.delete(info.key)


@pytest.fixture
def bucket(store: "ObjectStore", tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "ObjectStore":
    """`store`, as the bucket that tasks use, with a state folder of its own."""
    monkeypatch.setenv("CONVOY_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CONVOY_BUCKET", store.bucket)
    return store


@pytest.fixture
def place(store: "ObjectStore", tmp_path: Path) -> "Iterator[Workplace]":
    """Where sources fetch to: the empty bucket and an empty cache."""
    from infra.sources.base import Workplace
    from infra.sources.mirrors import Mirrors
    from infra.storage.cache import Cache

    with Mirrors(tmp_path / "partial") as mirrors:
        yield Workplace(mirrors=mirrors, store=store, cache=Cache(tmp_path / "cache", store))


@pytest.fixture
def web() -> Iterator[WebServer]:
    """An HTTP server."""
    with web_server() as server:
        yield server
