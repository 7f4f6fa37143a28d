"""The wait for another try of a task, while a server is down, ends immediately when the flow must end."""

import subprocess
import sys

import httpx
import pytest
from prefect import flow, get_client, states, task
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run

from infra.errors import Outage
from tasks.orchestration import retries
from tasks.orchestration.cancellation import Cancelled, stop_if_cancelled
from tests.conftest import REPOSITORY
from tests.flows.conftest import quiet_prefect  # noqa: F401  # fixture

SIGNALLED = """
import os, signal
from infra.machine import stopping
stopping.listen()
from prefect import flow, task
from infra.errors import Outage
from tasks.orchestration.retries import RETRIED
@task(**RETRIED)
def away():
    print("tried", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    raise Outage("the server is away")
@flow
def waits():
    away()
try:
    stopping.attended(waits)
    status = 0
except stopping.Stopped as stopped:
    status = stopped.exit_status
stopping.end(status)
"""


@pytest.mark.long
def test_a_signal_ends_the_wait_for_another_try(stack: object) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (75, "tried\n"), done.stderr


@pytest.mark.long
def test_a_cancel_ends_the_wait_for_another_try(
    stack: object,
    quiet_prefect: None,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(retries, "PAUSES", (600.0,))  # longer than this test may take
    tries = []

    @task(**retries.RETRIED)
    def away() -> None:
        stop_if_cancelled()
        tries.append("tried")
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(flow_run.id, states.Cancelling(), force=True)
        raise Outage("the server is away")

    @flow
    def waits() -> State[None]:
        try:
            away()
        except Cancelled as cancelled:  # as Convoy's flows do: Prefect lets a cancelled run end in no other state
            return states.Cancelled(data=cancelled)  # type: ignore[arg-type]
        pytest.fail("it was not noticed")

    with pytest.raises(Cancelled):
        waits()
    assert tries == ["tried"]


def test_an_outage_of_prefect_is_one_too(
    stack: object,
    quiet_prefect: None,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(retries, "PAUSES", (0.0, 0.0))
    answers = iter([httpx.ConnectError(""), Outage("the server is away"), None])

    @task(**retries.RETRIED)
    def publish() -> str:
        if error := next(answers):
            raise error
        return "published"

    assert flow(lambda: publish(), name="publishes")() == "published"


def test_what_fails_otherwise_is_not_tried_again(stack: object, quiet_prefect: None) -> None:  # noqa: F811
    tries = []

    @task(**retries.RETRIED)
    def wrong() -> None:
        tries.append("tried")
        raise ValueError("a mistake")

    @flow
    def fails() -> None:
        wrong()

    with pytest.raises(ValueError, match="a mistake"):
        fails()
    assert tries == ["tried"]
