"""A training on two nodes, both on this machine; tests/faults/test_nodes.py has hosts, and what happens to them."""

from collections.abc import Callable

import pytest

from flows.summary import Summary
from tasks.config.launchers import NodesConfig
from tests.flows.conftest import CONFIG
from tests.flows.program import Program


@pytest.mark.slow
def test_two_nodes_give_the_weights_of_one_machine(
    trained: Summary, program: Callable[..., Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.train import train_flow

    monkeypatch.setenv("CONVOY_SLOTS", "1")
    joined = program("join", "--ranks", "1")
    nodes = {"name": "two-nodes", "launcher": "nodes", "nodes": NodesConfig(min=2, wait=60)}
    found = train_flow(CONFIG.model_copy(update=nodes))
    assert found.status == "done", found.error
    assert (found.weights_sha256, found.accuracy) == (trained.weights_sha256, trained.accuracy)
    assert found.world_size == 2
    joined.process.terminate()
    done = joined.wait()
    assert done.status == 0, done.stderr
    assert f"run {found.mlflow_run_id}: left" in done.stdout


def test_a_machine_without_the_trainings_servers_cannot_join(
    program: Callable[..., Program], monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    for name in ("AWS_ENDPOINT_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("CONVOY_HOME", f"{tmp_path}/elsewhere")
    done = program("join").wait()
    assert done.status == 2
    assert done.complaint.startswith("set AWS_ENDPOINT_URL")


@pytest.mark.long
def test_too_few_nodes_end_the_training_as_one_to_be_resumed(trained: Summary, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.train import train_flow
    from tasks.training.runs.tracked_run import Interrupted

    monkeypatch.setenv("CONVOY_SLOTS", "1")
    nodes = {"name": "no-nodes", "launcher": "nodes", "nodes": NodesConfig(min=2, wait=1)}
    with pytest.raises(Interrupted, match=r"fewer than nodes\.min 2 at step 0; `convoy resume"):
        train_flow(CONFIG.model_copy(update=nodes))
