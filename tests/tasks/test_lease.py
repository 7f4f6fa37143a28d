"""A model's lease: who waits for it, and how a lease that Prefect has lost is freed."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from uuid import uuid4

import httpx
import pytest
from prefect import flow, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.client.schemas.objects import FlowRun
from prefect.states import Completed, Running

from infra.tracking.tags import ALIVE, HELD_LEASE
from tasks.orchestration import model_lease as lease
from tasks.orchestration.model_lease import forgotten_leases, free_forgotten, limit_of, model_lease
from tasks.upkeep.doctor import settle_all
from tests.flows.conftest import quiet_prefect
from tests.tasks.leftovers import flow_run_in

__all__ = ["quiet_prefect"]  # a fixture


@pytest.fixture
def model(stack: object, quiet_prefect: None) -> Iterator[str]:
    name = f"leased-{uuid4().hex[:8]}"
    yield name
    free(name)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lease without a holder counts as forgotten from its first moment."""
    monkeypatch.setattr(lease, "FORGOTTEN_AFTER", timedelta(seconds=-60))


def take_without_lease(name: str) -> None:
    """The rows in Prefect's database after its server has lost a lease."""
    with get_client(sync_client=True) as client:
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=limit_of(name), limit=1))
        client.increment_concurrency_slots([limit_of(name)], 1, "concurrency")


def free(name: str) -> None:
    with get_client(sync_client=True) as client:
        for limit in client.read_global_concurrency_limits(limit=200):
            if limit.name == limit_of(name):
                client.delete_global_concurrency_limit_by_name(limit.name)


def holder(name: str) -> FlowRun:
    """A flow run that trains elsewhere."""
    found = flow_run_in(Running(), name="train")
    with get_client(sync_client=True) as client:
        client.update_flow_run_labels(found.id, {HELD_LEASE: limit_of(name)})
        return client.read_flow_run(found.id)


def end(run: FlowRun) -> None:
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(run.id, Completed(), force=True)


@pytest.mark.long
def test_a_lease_that_prefect_has_forgotten_is_taken(
    model: str, at_once: None, caplog: pytest.LogCaptureFixture
) -> None:
    take_without_lease(model)
    got: list[str] = []

    @flow
    def train() -> None:
        with model_lease(model):
            got.append(model)

    train()
    assert got == [model]
    assert "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE" in caplog.text


def test_a_slot_whose_holder_is_under_way_is_not_forgotten(model: str, at_once: None) -> None:
    take_without_lease(model)
    run = holder(model)
    assert limit_of(model) not in forgotten_leases()
    assert not free_forgotten(limit_of(model))
    end(run)
    assert limit_of(model) in forgotten_leases()


def test_what_a_killed_flow_run_of_this_machine_held_is_free_at_once(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_without_lease(model)
    killed = holder(model)
    monkeypatch.setattr(lease, "settle_killed_flow_runs", lambda: (end(killed), [killed])[1])
    monkeypatch.setattr(lease.stopping, "wait", lambda _: pytest.fail("it waits"))

    @flow
    def train() -> None:
        with model_lease(model):
            pass

    train()


@pytest.mark.long
def test_what_goes_on_without_its_lease_is_waited_for(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefect lets leases expire that could not be renewed during an outage."""
    training, waits = holder(model), []
    monkeypatch.setattr(lease, "is_alive_here", str(training.id).__eq__)
    monkeypatch.setattr(lease.stopping, "wait", lambda _: waits.append(end(training)))

    @flow
    def train() -> None:
        with model_lease(model):
            pass

    train()
    assert len(waits) == 1


@pytest.mark.parametrize("lives", [True, False])
def test_a_holder_elsewhere_that_gives_signs_of_life_is_waited_for(
    lives: bool, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has lost its lease in an outage. Without a new sign, it counts as dead after some looks."""
    training, waits = holder(model), list[int]()

    def beat(_: float) -> None:
        waits.append(len(waits))
        if lives and len(waits) == 9:
            end(training)
        with get_client(sync_client=True) as client:
            client.update_flow_run_labels(training.id, {ALIVE: str(len(waits) if lives else 0)})

    monkeypatch.setattr(lease, "SILENT_POLLS", 3)
    monkeypatch.setattr(lease.stopping, "wait", beat)
    beat(0)

    @flow
    def train() -> None:
        with model_lease(model):
            pass

    train()
    assert len(waits) == (9 if lives else 4)


def test_an_outage_of_prefect_is_outlasted(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = ["settle_killed_flow_runs", "_acquire", "label_flow_run"]
    failed: list[str] = []

    def once(name: str) -> object:
        real = getattr(lease, name)

        def call(*arguments: object, **options: object) -> object:
            if name not in failed:
                failed.append(name)
                raise httpx.ConnectError("Connection refused")
            return real(*arguments, **options)

        return call

    for name in failing:
        monkeypatch.setattr(lease, name, once(name))

    @flow
    def train() -> str:
        with model_lease(model):
            return "trained"

    assert train() == "trained" and failed == failing


def test_prefect_need_not_be_there_when_a_lease_is_given_back(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def cannot_be_released(*_: object, **__: object) -> Iterator[None]:
        yield
        raise httpx.ConnectError("Connection refused")

    monkeypatch.setattr(lease, "concurrency", cannot_be_released)

    @flow
    def train() -> str:
        with model_lease(model):
            return "trained"

    assert train() == "trained"


def test_a_slot_that_was_taken_just_now_is_not_forgotten(model: str) -> None:
    take_without_lease(model)
    assert limit_of(model) not in forgotten_leases()


def test_doctor_frees_it(model: str, at_once: None) -> None:
    take_without_lease(model)
    assert [(found.kind, found.what) for found in settle_all() if found.what == limit_of(model)] == [
        ("lease", limit_of(model))
    ]
    assert limit_of(model) not in forgotten_leases()


def test_a_flow_run_says_that_it_holds_the_lease_and_then_that_it_does_not(model: str) -> None:
    found: list[str | None] = []

    def label(run_id: object) -> str | None:
        with get_client(sync_client=True) as client:
            value = client.read_flow_run(run_id).labels.get(HELD_LEASE)  # type: ignore[arg-type]
        return str(value) if value is not None else None

    @flow
    def train() -> object:
        from prefect.runtime import flow_run

        with model_lease(model):
            found.append(label(flow_run.id))
        found.append(label(flow_run.id))

    train()
    assert found == [limit_of(model), ""]


def test_waiting_logs_no_errors(model: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    take_without_lease(model)
    looks: list[float] = []

    def look(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            free(model)

    monkeypatch.setattr(lease.stopping, "wait", look)

    @flow
    def train() -> None:
        with model_lease(model):
            pass

    train()
    assert len(looks) == 3
    assert "ERROR" not in "".join(capfd.readouterr())
