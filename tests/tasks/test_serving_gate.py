"""The serving gate on the real stack: a fresh process, a real model server, and what both refuse."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from mlflow.artifacts import download_artifacts
from mlflow.tracking import MlflowClient
from prefect import flow
from prefect.artifacts import Artifact

from infra.errors import Outage
from infra.tracking.model_registry import aliased
from tasks.config.gates import ServingConfig
from tasks.evaluation.evaluate import Evaluation
from tasks.evaluation.reference_images import load_reference, store_reference
from tasks.release.serving.clients import FRESH_PROCESS, ConsumerFailed, FreshProcesses, post_images
from tasks.release.serving_gate import ServingRefused, ServingReport, serving_gate, try_serving
from tests.tasks.registered import Registered, register_digits


@pytest.fixture(scope="module")
def registered(stack: object, tmp_path_factory: pytest.TempPathFactory) -> Registered:
    return register_digits("serving-tests", tmp_path_factory.mktemp("weights"))


def gate(registered: Registered, evaluated: Evaluation, config: ServingConfig) -> ServingReport:
    @flow
    def run() -> ServingReport:
        with FreshProcesses() as fresh:
            return serving_gate(registered.version, evaluated, config, fresh)

    return run()


def servers() -> set[int]:
    """Returns the processes that serve models of this session's stack."""
    found = set()
    for process in psutil.process_iter():
        try:
            serves = any(word.endswith("fresh_process.py") for word in process.cmdline())
            ours = serves and process.environ().get("CONVOY_HOME") == os.environ["CONVOY_HOME"]
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                found.add(process.pid)
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="module")
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder for temporary files while `report` is made."""
    return tmp_path_factory.mktemp("temporary")


@pytest.fixture(scope="module")
def report(registered: Registered, temporary: Path) -> ServingReport:
    """The report on the good version, which has no alias before."""
    assert aliased(registered.version.name, "challenger") is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(temporary))
        patch.setattr(tempfile, "tempdir", None)
        return gate(registered, registered.evaluated, ServingConfig())


@pytest.mark.long
def test_a_process_that_predicts_finds_its_libraries_loaded(
    registered: Registered, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    images = load_reference(registered.store, registered.evaluated.reference_key)["images"]
    with FreshProcesses() as fresh:
        fresh.predict(registered.version.uri, images, [1], ServingConfig().time_limit)
        (log,) = Path(fresh._folder.name).glob("*/log")
        loaded = re.findall(r"^import time:.*\| +(\S+)", log.read_text(), re.MULTILINE)
    assert loaded  # as it does for its own files
    assert sum(name.startswith(("torch", "sympy", "mlflow")) for name in loaded) < 50  # of more than 700


@pytest.mark.long
def test_trying_a_model_leaves_no_copy_of_it_behind(report: ServingReport, temporary: Path) -> None:
    assert list(temporary.iterdir()) == []


@pytest.mark.long
def test_good_version_passes_and_becomes_challenger(registered: Registered, report: ServingReport) -> None:
    names = [check.name for check in report.checks]
    assert {"pyfunc, batch of 1", "pyfunc, batch of 64", "HTTP, batch of 1", "HTTP, batch of 64"} <= set(names)
    assert sum("refuses" in name for name in names) == 10
    assert report.passed
    assert aliased(registered.version.name, "challenger") == registered.version
    tags = MlflowClient().get_model_version(registered.version.name, registered.version.version).tags
    assert tags["convoy.serving"] == "passed"
    stored = Path(download_artifacts(run_id=registered.evaluated.run_id, artifact_path="report/serving.json"))
    assert ServingReport.model_validate(json.loads(stored.read_text())) == report
    assert "pyfunc, batch of 64" in str(Artifact.get("serving-gate").data)  # type: ignore[union-attr]
    assert not servers()


@pytest.mark.long
def test_refusals_say_what_is_wrong(report: ServingReport) -> None:
    said = {check.name: check.detail for check in report.checks}
    for way in ("pyfunc", "HTTP"):
        assert "does not match expected shape (-1, 1, 8, 8)" in said[f"{way} refuses another height"]
        assert "does not match expected shape (-1, 1, 8, 8)" in said[f"{way} refuses another number of channels"]
        assert "(1, 8, 8)" in said[f"{way} refuses no batch"]
    assert "dtype of input float32 does not match expected dtype uint8" in said["pyfunc refuses floats"]
    assert "256 out of bounds for uint8" in said["HTTP refuses a value beyond 255"]


@pytest.mark.slow
def test_version_that_differs_in_the_last_image_is_refused(registered: Registered) -> None:
    reference = load_reference(registered.store, registered.evaluated.reference_key)
    reference["probabilities"][-1] += 1e-4  # only the largest batch shows it
    key = "runs/other/reference.safetensors"
    store_reference(registered.store, key, **reference)
    other = registered.evaluated.model_copy(update={"reference_key": key})
    if aliased(registered.version.name, "challenger"):
        MlflowClient().delete_registered_model_alias(registered.version.name, "challenger")
    with pytest.raises(ServingRefused, match=r"pyfunc, batch of 64: largest difference 0\.0001") as refused:
        gate(registered, other, ServingConfig(http=False))
    assert refused.value.exit_status == 3
    assert "batch of 1:" not in str(refused.value)
    assert aliased(registered.version.name, "challenger") is None
    tags = MlflowClient().get_model_version(registered.version.name, registered.version.version).tags
    assert tags["convoy.serving"] == "failed"
    let_pass = gate(registered, other, ServingConfig(http=False, tolerance=1e-3))
    assert let_pass.checks[-1].outcome == "not tested"
    assert let_pass.count.endswith("; not tested: is served over HTTP (serving.http=false switches it off)")
    assert "| is served over HTTP | not tested | serving.http=false switches it off |" in let_pass.markdown()


@pytest.mark.long
def test_version_without_files_is_refused_without_waiting_for_a_server(registered: Registered) -> None:
    client = MlflowClient()
    experiment = client.get_run(registered.evaluated.run_id).info.experiment_id
    empty = client.create_logged_model(experiment, name="empty", source_run_id=registered.evaluated.run_id)
    made = client.create_model_version(registered.version.name, f"models:/{empty.model_id}", model_id=empty.model_id)
    lost = registered.version.model_copy(update={"version": str(made.version)})
    reference = load_reference(registered.store, registered.evaluated.reference_key)
    with FreshProcesses() as fresh:
        report = try_serving(lost, reference["images"], reference["probabilities"], 1e-5, ServingConfig(), fresh)
        assert [check.passed for check in report.checks] == [False]
        assert "gave no predictions in a fresh process" in report.checks[0].detail
        fresh.load()
        with pytest.raises(ConsumerFailed, match="cannot be served over HTTP"), fresh.serve(lost.uri, 120):
            pass


@pytest.mark.long
def test_libraries_load_without_a_device_or_a_python_thread_since_forks_could_not_use_one() -> None:
    program = f"""
import runpy, threading
import torch
asked = []
for name in ("is_available", "device_count", "init", "_lazy_init"):
    setattr(torch.cuda, name, lambda *_, name=name: asked.append(name))
runpy.run_path({str(FRESH_PROCESS)!r}, run_name="loaded")
print(asked, threading.active_count())
"""
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[] 1\n"


@pytest.mark.long
def test_processes_start_again_after_they_were_dismissed(registered: Registered) -> None:
    """As if the gate is tried again after an outage."""
    images = load_reference(registered.store, registered.evaluated.reference_key)["images"]
    before = servers()
    with FreshProcesses() as fresh:
        fresh.load()
        first = servers() - before
        fresh.dismiss()
        with pytest.raises(ConsumerFailed, match="dismissed"):
            fresh.predict(registered.version.uri, images, [1], 120)
        fresh.load()
        assert fresh.predict(registered.version.uri, images, [1], 120).predictions[1].shape == (1, 10)
        assert len(first) == 1 and servers() & first == set()
    assert servers() == before


@pytest.mark.long
def test_killed_processes_are_no_verdict_on_the_version(registered: Registered) -> None:
    """As when memory runs out: the step is then tried again."""
    reference = load_reference(registered.store, registered.evaluated.reference_key)
    images, config, before = reference["images"], ServingConfig(), servers()

    def kill_first() -> None:
        while not (started := servers() - before):
            pass
        os.kill(min(started), signal.SIGKILL)

    with FreshProcesses() as fresh, ThreadPoolExecutor(1) as executor:
        killed = executor.submit(kill_first)
        with pytest.raises(Outage, match="was killed"):
            try_serving(registered.version, images, reference["probabilities"], 1e-5, config, fresh)
        killed.result()
        fresh.load()
        loaded = servers() - before
        with pytest.raises(Outage, match="was killed"), fresh.serve(registered.version.uri, 120) as client:
            for process in servers() - before - loaded:
                os.kill(process, signal.SIGKILL)
            post_images(client, images[:1].tolist())


@pytest.mark.slow
def test_server_does_not_outlive_a_killed_owner(registered: Registered) -> None:
    before = servers()
    program = (
        "import sys, time\nfrom tasks.release.serving.clients import FreshProcesses\n"
        "with FreshProcesses() as fresh, fresh.serve(sys.argv[1], 200):\n"
        "    print('up', flush=True)\n    time.sleep(600)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", program, registered.version.uri], stdout=subprocess.PIPE)
    try:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"up\n"
        assert len(servers() - before) >= 2
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.communicate()
    deadline = time.monotonic() + 20
    while servers() - before:
        assert time.monotonic() < deadline, "a model server lives on"
        time.sleep(0.2)


@pytest.mark.slow
def test_fractions_are_what_the_server_does_not_refuse(registered: Registered) -> None:
    """A limit of MLflow's server that users have to know: it rounds towards zero."""
    images = load_reference(registered.store, registered.evaluated.reference_key)["images"][:1]
    with FreshProcesses() as fresh, fresh.serve(registered.version.uri, 200) as client:
        whole = post_images(client, images.tolist()).json()
        assert post_images(client, (images.float() + 0.4).clamp(max=255).tolist()).json() == whole
