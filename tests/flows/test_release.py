"""Gates through the command line: refusals and their messages, and the commands that change the champion."""

import contextvars
import json
import threading
from pathlib import Path
from uuid import UUID

import numpy as np
import pytest
from mlflow.tracking import MlflowClient
from prefect import flow, get_client
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.responses import SetStateStatus
from prefect.context import FlowRunContext

from infra.tracking.model_registry import ModelVersion, aliased, set_alias
from tasks.config.gates import GateConfig
from tasks.orchestration.cancellation import Cancelled
from tasks.release.approval import ApprovalRefused, wait_for_approval
from tasks.release.quality.checks import Scored
from tasks.release.quality.judge import judge
from tests.flows.conftest import CONFIG, Convoy
from tests.flows.program import wait_for

SMALL = CONFIG.model_copy(update={"epochs": 1, "ranks": 1})


def test_data_that_a_gate_refuses_are_not_trained_on(convoy: Convoy, stack: object, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    limit = ("--set", "data_gate.class_images=fail", "--set", "data_gate.min_class_images=1000")
    done = convoy(
        "train", "--dataset", "digits", "--limit", "600", "--name", "poor-data", *limit, "--summary", str(out)
    )
    assert done.status == 3
    assert "dataset digits is refused: class_images is 60, limit 1000" in done.stderr
    found = json.loads(out.read_bytes())
    assert (found["status"], found["exit_status"]) == ("refused", 3)
    assert "mlflow_run_id" not in found and "accuracy" not in found
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(UUID(found["prefect_flow_run_id"])).state
    assert state is not None
    assert (state.type, state.name) == (StateType.COMPLETED, "Refused")
    assert "class_images" in (state.message or "")


def test_model_that_a_gate_refuses_stays_out_until_it_is_forced(convoy: Convoy, tmp_path: Path) -> None:
    out, config = tmp_path / "out.json", tmp_path / "config.yaml"
    config.write_text(json.dumps(SMALL.model_copy(update={"name": "poor-model"}).resolved()))
    done = convoy("train", "--config", str(config), "--set", "gate.floor=0.999", "--summary", str(out))
    assert done.status == 3
    assert "the quality gate refused: poor-model/1" in done.stderr
    assert "poor-model, version 1: not champion" in done.stdout
    found = json.loads(out.read_bytes())
    assert (found["status"], found["champion"], found["model_version"]) == ("refused", False, "1")
    assert 0 < found["accuracy"] < 0.999 and found["verdict"].startswith("refused: poor-model/1")
    run = MlflowClient().get_run(found["mlflow_run_id"])
    assert run.info.status == "FINISHED"  # the training was in order
    assert "quality gate: refused" in run.data.tags["mlflow.note.content"]

    refused = convoy("promote", "poor-model", "1")
    assert refused.status == 3
    assert "poor-model/1 is not promoted: the quality gate refused" in refused.complaint
    assert convoy("promote", "poor-model", "1", "--force").status == 2  # no reason
    assert aliased("poor-model", "champion") is None
    assert convoy("history", "poor-model").stdout.startswith("poor-model has no champion yet")
    (row,) = (line.split() for line in convoy("runs").stdout.splitlines() if found["mlflow_run_id"] in line)
    assert "poor-model/1" in row and row[-2:] == [f"{found['accuracy']:.2%}", "refused"]
    (row,) = (line.split() for line in convoy("models").stdout.splitlines() if line.split()[0] == "poor-model")
    assert row == ["poor-model", "none", "1"]

    judged = convoy("promote", "poor-model", "1", "--judge", "--set", "floor=0.999")
    assert judged.status == 3
    assert "floor" in judged.stdout
    forced = convoy("promote", "poor-model", "@challenger", "--force", "--reason", "a test")
    assert forced.status == 0, forced.stderr
    assert "poor-model was promoted to version 1" in forced.stdout
    assert aliased("poor-model", "champion") == ModelVersion(name="poor-model", version="1")
    verdict = MlflowClient().get_model_version("poor-model", "1").tags["convoy.verdict_sha256"]
    itself = convoy("promote", "poor-model", "1", "--judge")
    assert itself.status == 2
    assert "version 1 of 'poor-model' is its champion already" in itself.complaint
    assert MlflowClient().get_model_version("poor-model", "1").tags["convoy.verdict_sha256"] == verdict
    history = convoy("history", "poor-model").stdout
    assert "promote (forced)" in history and "a test" in history
    set_alias(ModelVersion(name="poor-model", version="1"), "previous")
    history = convoy("history", "poor-model").stdout
    assert "alias in MLflow differs: previous: 1 → none; `convoy doctor --fix` repairs it" in history
    assert aliased("poor-model", "previous") is not None  # a command that reads repairs nothing
    back = convoy("rollback", "poor-model")
    assert back.status == 2
    assert "version 1 is the first champion of 'poor-model'" in back.complaint
    compared = convoy("compare", "poor-model/1", "poor-model")
    assert compared.status == 0, compared.stderr
    assert "McNemar exact p = 1" in compared.stdout


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["promote", "nobody", "1"], "no model is called 'nobody'"),
        (["rollback", "nobody"], "'nobody' has no champion"),
        (["history", "nobody"], "no model is called 'nobody'"),
        (["compare", "nobody", "nobody/1"], "no model is called 'nobody'"),
    ],
)
def test_unknown_model_is_named(convoy: Convoy, stack: object, arguments: list[str], hint: str) -> None:
    done = convoy(*arguments)
    assert done.status == 2
    assert hint in done.complaint


def asking(patience: float, answer: dict[str, object] | None = None, *, cancel: bool = False) -> str:
    """Asks for approval in a flow run, which is answered or cancelled as soon as it has paused."""
    right = np.ones(10, dtype=np.bool_)
    verdict = judge(
        Scored(address="asked/1", correct=right), None, GateConfig(), labels=np.arange(10) % 2, classes=("a", "b")
    )

    def person(flow_run_id: UUID) -> None:
        with get_client(sync_client=True) as client:

            def paused() -> bool:
                state = client.read_flow_run(flow_run_id).state
                return state is not None and state.is_paused()

            wait_for(paused, "the flow run to pause")
            if cancel:
                client.set_flow_run_state(flow_run_id, _cancelling())
            elif answer is not None:

                def resumed() -> bool:
                    said = client.resume_flow_run(flow_run_id, run_input=answer)
                    return said.status == SetStateStatus.ACCEPT

                wait_for(resumed, "the answer to be taken")  # Prefect refuses it while it has not got the form yet

    @flow
    def run() -> str:
        context = FlowRunContext.get()
        assert context and context.flow_run
        somebody = threading.Thread(target=contextvars.copy_context().run, args=(person, context.flow_run.id))
        somebody.start()
        try:
            return wait_for_approval(ModelVersion(name="asked", version="1"), verdict, patience)
        finally:
            somebody.join()

    return run()


def _cancelling():  # type: ignore[no-untyped-def]
    from prefect.states import Cancelling

    return Cancelling()


def test_person_approves(stack: object, quiet_prefect: None) -> None:
    assert asking(60, {"promote": True, "reason": "looks right"}) == "looks right"


def test_person_says_no(stack: object, quiet_prefect: None) -> None:
    with pytest.raises(ApprovalRefused, match="asked/1 was not approved: too dark"):
        asking(60, {"promote": False, "reason": "too dark"})


def test_no_answer_in_time_refuses(stack: object, quiet_prefect: None) -> None:
    with pytest.raises(ApprovalRefused, match="asked/1 was not approved within 4 s"):
        asking(4)


def test_flow_run_is_cancelled_while_it_waits(stack: object, quiet_prefect: None) -> None:
    threads = set(threading.enumerate())
    with pytest.raises(Cancelled, match="while it waited"):
        asking(600, cancel=True)
    left = [thread for thread in threading.enumerate() if thread not in threads and "(run)" in thread.name]
    assert not left  # a thread that still polls Prefect; threads of libraries have names
