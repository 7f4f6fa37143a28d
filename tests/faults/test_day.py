"""A day in service: a schedule, an event, changed data, nothing changed, a cancel, a machine that dies, a worse model.

pytest -m faults tests/faults/test_day.py -s        prints what happens, with times
"""

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
import pytest
import yaml
from mlflow.tracking import MlflowClient
from PIL import Image
from prefect import get_client
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
from prefect.client.schemas.objects import FlowRun
from sklearn.datasets import load_digits

from infra.settings import Settings
from infra.storage.object_store import ObjectStore
from infra.tracking.model_registry import aliased
from infra.tracking.promotion_history import history
from tests.flows.program import Done, NextTraining, Program, running_worker, wait_for

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1200)]

MODEL = "day"
LONG = ("--set", "epochs=100000", "--force")


def tell(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {what}", flush=True)


@pytest.fixture
def photos(tmp_path: Path) -> Callable[[int, int], Path]:
    """Writes digits `start` to `stop` as images into class folders."""
    digits = load_digits()

    def write(start: int, stop: int) -> Path:
        for number in range(start, stop):
            folder = tmp_path / "photos" / str(digits.target[number])
            folder.mkdir(parents=True, exist_ok=True)
            pixels = (digits.images[number] * 15.9).astype("uint8")
            Image.fromarray(pixels).save(folder / f"{number:04}.png")
        return tmp_path / "photos"

    return write


@pytest.fixture
def convoy(stack: object, tmp_path: Path) -> Callable[..., Done]:
    """Runs a command as a process of its own, to its end."""
    number = iter(range(1000))

    def run(*arguments: str, patience: float = 200) -> Done:
        folder = tmp_path / f"command-{next(number)}"
        folder.mkdir()
        return Program(*arguments, folder=folder).wait(patience)

    return run


@pytest.fixture
def start_worker(stack: object, tmp_path: Path) -> Iterator[Callable[[], "subprocess.Popen[bytes]"]]:
    with ExitStack() as started:
        yield lambda: started.enter_context(running_worker(tmp_path, "day-pool"))


def deployments(file: Path, photos: Path, *, schedules: list[dict[str, str]]) -> Path:
    config = {
        "dataset": str(photos),
        "name": MODEL,
        "epochs": 6,
        "batch_size": 60,
        "network": {"width": 8},
        "augment": {"shift": 0, "flip": False},
        "serving": {"http": False},
        "gate": {"margin": 0.05, "max_class_drop": 0.5},
        "checkpoints": {"every": 1},
    }
    deployment = {
        "name": MODEL,
        "entrypoint": "flows.retrain.retrain_flow",
        "parameters": {"config": config},
        "work_pool": {"name": "day-pool"},
        "schedules": schedules,
        "triggers": [
            {
                "type": "event",
                "expect": ["convoy.data.changed"],
                "match": {"prefect.resource.id": f"convoy.dataset.{MODEL}"},
            }
        ],
    }
    file.write_text(yaml.safe_dump({"name": "convoy", "pull": [], "deployments": [deployment]}))
    return file


def runs() -> list[FlowRun]:
    """Of the deployment, the newest first."""
    with get_client(sync_client=True) as client:
        found = client.read_deployment_by_name(f"retrain/{MODEL}")
        only = DeploymentFilter(id=DeploymentFilterId(any_=[found.id]))
        all_runs = client.read_flow_runs(deployment_filter=only)
    return sorted(all_runs, key=lambda run: run.start_time.timestamp() if run.start_time else 0, reverse=True)


def named(state: str) -> list[FlowRun]:
    return [run for run in runs() if run.state and run.state.name == state]


def run_of(done: Done) -> FlowRun:
    with get_client(sync_client=True) as client:
        return client.read_flow_run(UUID(json.loads(done.stdout)["prefect_flow_run_id"]))


def our_processes() -> list[psutil.Process]:
    """Ranks, launchers and flow runs of this session's state folder."""
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            ours = process.environ().get("CONVOY_HOME") == os.environ["CONVOY_HOME"]
        except psutil.Error:
            continue
        if ours and any(
            word in ("tasks.training.supervisor", "tasks.training.rank", "prefect.engine") for word in words
        ):
            found.append(process)
    return found


def test_a_day(
    photos: Callable[[int, int], Path],
    convoy: Callable[..., Done],
    start_worker: Callable[[], "subprocess.Popen[bytes]"],
    tmp_path: Path,
) -> None:
    folder = photos(0, 700)
    every_minute = [{"slug": "minute", "cron": "* * * * *", "timezone": "UTC"}]
    file = deployments(tmp_path / "prefect.yaml", folder, schedules=every_minute)
    retrain = ("retrain", "-d", MODEL, "--wait", "--json")

    assert convoy("deploy", "--file", str(file)).status == 0
    worker = start_worker()
    tell("deployed; the schedule fires every minute")
    wait_for(lambda: named("Completed"), "the schedule to train", 240)
    champion = aliased(MODEL, "champion")
    assert champion and champion.version == "1"
    tell("the schedule has trained version 1, which is champion")
    skipped = wait_for(lambda: named("Skipped"), "a minute in which nothing has changed", 150)[0]
    tell(f"a minute later nothing had changed: skipped in {skipped.total_run_time.total_seconds():.1f} s")

    assert convoy("deploy", "--file", str(deployments(file, folder, schedules=[]))).status == 0
    with get_client(sync_client=True) as client:
        assert client.read_deployment_by_name(f"retrain/{MODEL}").schedules == []
    wait_for(lambda: not [run for run in runs() if run.state and not run.state.is_final()], "the last scheduled run")
    tell("the schedule is gone from the file, and from Prefect")

    photos(700, 1797)
    before = len(named("Completed"))
    assert convoy("notify-data", MODEL).status == 0
    wait_for(lambda: len(named("Completed")) > before, "the event to retrain", 240)
    champion = aliased(MODEL, "champion")
    assert champion and champion.version == "2"
    tell("new images, and an event: version 2 is champion")

    began = time.monotonic()
    done = convoy(*retrain)
    assert (done.status, json.loads(done.stdout)["status"]) == (0, "unchanged"), done.stderr
    took = run_of(done).total_run_time.total_seconds()
    tell(f"asked again, nothing to do: flow run {took:.1f} s, the command {time.monotonic() - began:.1f} s")

    next_training = NextTraining(Settings())
    assert convoy("retrain", "-d", MODEL, *LONG).status == 0
    training = next_training.under_way()
    began = time.monotonic()
    assert convoy("cancel", training.run_id).status == 0
    training.assert_ends()
    wait_for(lambda: named("Cancelled"), "the cancelled run to end")
    tell(f"cancelled one: every rank gone after {time.monotonic() - began:.1f} s, the command's own start included")
    assert MlflowClient().get_run(training.run_id).info.status == "KILLED"

    next_training = NextTraining(Settings())
    asked = convoy("retrain", "-d", MODEL, *LONG, "--json")
    training = next_training.under_way()
    lost = [worker, *psutil.Process(worker.pid).children(recursive=True)]
    flow_processes = [process for process in lost if "tasks." not in " ".join(_cmdline(process))]
    for process in flow_processes:
        _kill(process)
    training.assert_ends()
    tell("the worker and its flow run were killed with -9: every rank is gone")
    assert MlflowClient().get_run(training.run_id).info.status == "RUNNING"  # nobody could say otherwise
    worker = start_worker()
    wait_for(
        lambda: MlflowClient().get_run(training.run_id).info.status == "KILLED", "the new worker to settle the run", 90
    )
    wait_for(lambda: run_of(asked).state.is_final(), "the lost flow run to be settled")  # type: ignore[union-attr]
    tell(f"a new worker has settled what was left: the flow run is {run_of(asked).state.name}")  # type: ignore[union-attr]
    reached = training.steps()
    wait_for(lambda: training.steps() > reached, "the training to go on by itself", 120)
    cancelled = len(named("Cancelled"))
    assert convoy("cancel", training.run_id).status == 0
    wait_for(lambda: len(named("Cancelled")) > cancelled, "its new flow run to be cancelled")
    tell(f"it went on by itself beyond step {reached}, and was cancelled")

    worse = ("--set", "lr=0.000001", "--set", "epochs=1")
    done = convoy(*retrain, *worse)
    assert done.status == 3, done.stderr
    tell(f"a worse model: {json.loads(done.stdout)['verdict']}")
    done = convoy(*retrain, *worse)
    assert json.loads(done.stdout)["status"] == "unchanged"
    tell(f"and again: {json.loads(done.stdout)['reason']}")

    planned = convoy("prune", "--dry-run")
    assert planned.status == 0, planned.stderr
    assert convoy("prune").status == 0
    tell("pruned")

    store = ObjectStore.connect(Settings().bucket)
    assert [entry.to_version for entry in history(store, MODEL)] == ["1", "2"]
    champion, previous = aliased(MODEL, "champion"), aliased(MODEL, "previous")
    assert champion and previous and (champion.version, previous.version) == ("2", "1")
    assert not [run.name for run in runs() if run.state and not run.state.is_final()]
    assert not our_processes()
    assert not _running(MODEL)
    found = convoy("doctor")
    assert found.status == 0, found.stdout
    out = tmp_path / "predictions.csv"
    assert convoy("predict", MODEL, str(folder), "--out", str(out)).status == 0
    assert len(out.read_text().splitlines()) == 1 + 1797
    tell("the end: version 2 is champion, its history is whole, nothing is orphaned, and it predicts")


def _cmdline(process: Any) -> list[str]:
    try:
        return psutil.Process(process.pid).cmdline()
    except psutil.Error:
        return []


def _kill(process: "psutil.Process | subprocess.Popen[bytes]") -> None:
    try:
        process.kill()
    except (psutil.Error, ProcessLookupError):
        pass


def _running(model: str) -> list[str]:
    client = MlflowClient()
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    condition = f"attributes.status = 'RUNNING' and tags.`convoy.model` = '{model}'"
    return [run.info.run_id for run in client.search_runs(experiments, condition)]
