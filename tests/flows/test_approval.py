"""Approval of promotions: a person's answer in Prefect, and what happens to the model while nobody has answered."""

import contextvars
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from mlflow.tracking import MlflowClient
from prefect import flow, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.responses import SetStateStatus
from prefect.context import FlowRunContext
from prefect.input.actions import read_flow_run_input
from prefect.states import Cancelling
from prefect.utilities.urls import url_for

from flows import candidate
from flows.candidate import _release
from flows.cli.models import _renew_pages
from flows.step_timer import StepTimer
from flows.summary import Refused, Summary
from infra.storage.object_store import open_bucket
from infra.tracking import mlflow_runs
from infra.tracking.mlflow_runs import run_url
from infra.tracking.model_registry import ModelVersion, RegisteredVersion, aliased, tag_version
from infra.tracking.model_versions import find_version
from infra.tracking.promotion_history import history, rollback
from infra.tracking.tags import APPROVED, EXPIRED, REFUSED, WAITING, VersionRecord, decision
from tasks.config.run import RunConfig
from tasks.orchestration.cancellation import Cancelled
from tasks.orchestration.model_lease import limit_of
from tasks.release.approval import record_decision, wait_for_approval
from tasks.release.model_card import with_approval
from tasks.release.promote import promote_version, verdict_on
from tasks.release.quality_gate import quality_gate
from tasks.release.release import release
from tasks.upkeep.in_use import references
from tests.flows.conftest import Convoy
from tests.flows.program import PATIENCE, SMALL, NextTraining, Program, reported, sets, wait_for
from tests.tasks.registered import register_digits

ANN = {"decision": "promote", "name": "Ann", "reason": "looks right"}
BOB = {"decision": "refuse", "name": "Bob", "reason": "too dark"}
GATE = {"floor": 0, "min_class_recall": 0}
CONFIG = RunConfig.model_validate({"dataset": "digits", "approval": True, "promote": True, "gate": GATE})
SETTINGS = (*SMALL, "epochs=1", "ranks=1", "promote=true")


def answer(flow_run: UUID, given: dict[str, str]) -> str:
    """Answers a paused flow run as Prefect's page does; returns why Prefect does not take the answer, or nothing."""
    with get_client(sync_client=True) as client:
        said = client.resume_flow_run(flow_run, run_input=given)
    return "" if said.status == SetStateStatus.ACCEPT else str(getattr(said.details, "reason", said.status))


def paused(flow_run: UUID) -> bool:
    """Whether the flow run waits, and its form is there: the form follows the state."""
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(flow_run).state
    return bool(state and state.is_paused()) and answer(flow_run, {}).endswith("is a required property")


def waiting_run(name: str) -> FlowRun:
    """Waits until a flow run waits for an approval of a version of this model; returns the flow run."""
    version = wait_for(lambda: _awaited(name), f"a version of {name} to wait", 2 * PATIENCE)
    run_id = MlflowClient().get_model_version(name, version).run_id
    flow_run = UUID(MlflowClient().get_run(run_id).data.tags["prefect.flow_run_id"])
    wait_for(lambda: paused(flow_run), "the flow run to pause")
    with get_client(sync_client=True) as client:
        return client.read_flow_run(flow_run)


def _awaited(name: str) -> str | None:
    found = MlflowClient().search_model_versions(f"name = '{name}'")
    return next((each.version for each in found if each.tags.get("convoy.approval") == WAITING), None)


@dataclass
class Asked:
    """Asks about a version in a flow run, while a person acts in another thread."""

    version: ModelVersion

    def __call__(self, patience: float, person: Callable[[UUID], object] = lambda _: None) -> VersionRecord:
        @flow
        def run() -> VersionRecord:
            context = FlowRunContext.get()
            assert context and context.flow_run
            flow_run = context.flow_run.id
            verdict = quality_gate(self.version, CONFIG.gate)

            def act() -> None:
                wait_for(lambda: paused(flow_run), "the flow run to pause")
                person(flow_run)

            thread = threading.Thread(target=contextvars.copy_context().run, args=(act,))
            thread.start()
            try:
                return wait_for_approval(self.version, verdict, patience)
            finally:
                thread.join()

        return run()


@pytest.fixture(scope="module")
def asking(stack: object, quiet_prefect: None, tmp_path_factory: pytest.TempPathFactory) -> Asked:
    return Asked(register_digits("asked", tmp_path_factory.mktemp("asked")).version)


@pytest.mark.long
def test_person_must_choose_and_give_a_name_and_a_reason(asking: Asked) -> None:
    refusals: list[str] = []

    def person(flow_run: UUID) -> None:
        for given in ({"promote": True, "reason": "an older script"}, {**ANN, "name": " "}, {**ANN, "decision": "yes"}):
            refusals.append(answer(flow_run, given))
            assert paused(flow_run)
        assert answer(flow_run, {**ANN, "name": " Ann "}) == ""

    assert asking(60, person) == decision(APPROVED, "Ann", "looks right")
    assert all("Validation failed" in refusal for refusal in refusals), refusals


@pytest.mark.long
def test_person_refuses(asking: Asked) -> None:
    asked: list[UUID] = []
    shown: list[object] = []

    def person(flow_run: UUID) -> None:
        asked.append(flow_run)
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(flow_run).state
        assert state is not None and state.state_details.run_input_keyset is not None
        shown.append(read_flow_run_input(state.state_details.run_input_keyset["description"], flow_run_id=flow_run))
        answer(flow_run, BOB)

    made = asking(60, person)
    assert run_url(find_version("asked/1").run_id, "artifacts/report/index.html") in str(shown[0])
    assert made == decision(REFUSED, "Bob", "too dark")
    told = reported("convoy.waiting", str(asked[0]))
    assert told.startswith("asked/1 waits for approval: ")
    assert told.endswith(f"promote or refuse: {url_for('flow-run', obj_id=asked[0])}")
    assert made.approval_sentence == "refused by Bob: too dark"


@pytest.mark.long
def test_no_answer_in_time_is_no_approval(asking: Asked) -> None:
    assert asking(4) == decision(EXPIRED)
    assert decision(EXPIRED).approval_sentence == "nobody decided in time"


@pytest.mark.long
def test_flow_run_is_cancelled_while_it_waits(asking: Asked) -> None:
    def cancel(flow_run: UUID) -> None:
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(flow_run, Cancelling())

    with pytest.raises(Cancelled, match="Cancelling while it waited for approval"):
        asking(600, cancel)


@pytest.mark.long
def test_champion_that_changed_meanwhile_is_what_a_version_is_judged_against(
    stack: object, quiet_prefect: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (register_digits("overtaken", tmp_path).version for _ in range(2))
    config = CONFIG.model_copy(update={"data": CONFIG.data.model_copy(update={"slices": ("camera",)})})
    slices: list[tuple[str, ...]] = []

    def judged(*arguments: Any, **options: Any) -> Any:
        slices.append(options["slices"])
        return quality_gate(*arguments)  # without them: digits have no camera

    monkeypatch.setattr(candidate, "quality_gate", judged)

    @flow
    def run() -> Summary:
        for version in (first, second):
            tag_version(version, VersionRecord(serving="passed").to_tags())
            assert quality_gate(version, CONFIG.gate).champion is None
        record_decision(second, decision(WAITING))
        assert release(first)
        assert not release(second, decision(APPROVED, "Ann", "looks right"))
        assert aliased("overtaken", "champion") == first
        return _release(Summary(status="done"), config, second, decision(APPROVED, "Ann", "looks right"))

    summary = run()
    assert summary.champion
    assert slices == [("camera",)]
    assert "against overtaken/1" in (summary.verdict or "")
    newest = history(open_bucket(), "overtaken")[-1]
    assert (newest.to_version, newest.approved_by, newest.from_version) == ("2", "Ann", "1")
    assert newest.reason.endswith("; approved by Ann: looks right")
    verdict = verdict_on(open_bucket(), find_version("overtaken/2"))
    assert verdict is not None and verdict.champion == "overtaken/1"


@pytest.mark.long
def test_promotion_by_hand_of_a_version_that_waits_is_shown_as_its_decision(
    stack: object, quiet_prefect: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = register_digits("by-hand", tmp_path).version

    def found() -> RegisteredVersion:
        return find_version(version.address)

    def promote_meanwhile(*_: object) -> VersionRecord:
        assert found().record.outcome == "waits for approval"
        promoted = promote_version(version, reason="seen them all")
        assert found().record.approval_sentence == f"approved by {promoted.who}: seen them all"
        run = MlflowClient().get_run(found().run_id).data.tags
        assert run["convoy.verdict"] == "passed"
        assert run["convoy.result"] == found().record.result == found().record.headline
        described = MlflowClient().get_registered_model("by-hand").description
        assert described == f"{found().record.headline}: version 1, the champion."
        return decision(EXPIRED)

    monkeypatch.setattr(candidate, "wait_for_approval", promote_meanwhile)
    monkeypatch.setattr(candidate, "publish_page", lambda _: None)

    @flow
    def run() -> Summary:
        tag_version(version, VersionRecord(serving="passed").to_tags())
        quality_gate(version, CONFIG.gate)
        record_decision(version, decision(WAITING))
        waiting = Summary(status="done", model_name="by-hand", model_version="1")
        return candidate.with_approval(waiting, CONFIG, StepTimer())

    summary = run()
    assert (summary.status, summary.champion) == ("done", True)
    assert summary.approval == found().record.approval_sentence
    assert summary.approval.endswith(": seen them all")
    assert f"**Approval**: {summary.approval}." in found().description


@pytest.mark.long
def test_a_promotion_that_was_rolled_back_is_no_approval(
    stack: object, quiet_prefect: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    champion, version = (register_digits("taken-back", tmp_path).version for _ in range(2))

    def try_out_and_refuse(*_: object) -> VersionRecord:
        promote_version(version)
        assert rollback(open_bucket(), "taken-back").to_version == champion.version
        return decision(REFUSED, "Ann", "blurry")

    monkeypatch.setattr(candidate, "wait_for_approval", try_out_and_refuse)

    @flow
    def run() -> Summary:
        for each in (champion, version):
            tag_version(each, VersionRecord(serving="passed").to_tags())
            quality_gate(each, CONFIG.gate)
            if each == champion:
                assert release(each)
        record_decision(version, decision(WAITING))
        waiting = Summary(status="done", model_name="taken-back", model_version=version.version)
        return candidate.with_approval(waiting, CONFIG, StepTimer())

    summary = run()
    assert (summary.status, summary.approval) == ("refused", "refused by Ann: blurry")
    refused = find_version(version.address)
    assert refused.record.approval_sentence == "refused by Ann: blurry"
    assert refused.record.result == f"{refused.record.accuracy:.2%} test accuracy, not approved"

    promoted = promote_version(version, reason="sharp enough")  # which a person may decide later
    record = find_version(version.address).record
    assert record.approval_sentence == f"approved by {promoted.who}: sharp enough"
    assert record.result == f"{record.accuracy:.2%} test accuracy, passed"
    _renew_pages(refused)
    assert f"**Approval**: {record.approval_sentence}." in find_version(version.address).description
    page = mlflow_runs.fetch_artifacts(refused.run_id, "report", tmp_path / "report")
    for name in ("verdict.md", "index.html"):
        text = (page / name).read_text()
        assert "sharp enough" in text and "blurry" not in text


def test_card_has_one_decision_before_its_first_section() -> None:
    card = "# m, version 1\n\n90 %\n\n## Use\n\ntext\n"
    once = with_approval(card, "waiting for a person's decision")
    assert with_approval(once, "refused by Bob: *too* dark") == (
        "# m, version 1\n\n90 %\n\n**Approval**: refused by Bob: \\*too\\* dark.\n\n## Use\n\ntext\n"
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_other_trainings_and_promotions_go_on_while_a_version_waits(
    program: Callable[..., Program], convoy: Convoy, tmp_path: Path
) -> None:
    """The version that waits was trained too little to pass against the champion of the other training."""
    name, out = "overtaking", tmp_path / "out.json"
    common = ("train", "--dataset", "digits", "--name", name)
    asked = program(*common, *sets(*SETTINGS, "approval=true", "lr=1e-6"), "--summary", str(out))
    paused_run = waiting_run(name)
    since = time.monotonic()
    link = f"/runs/flow-run/{paused_run.id}"
    assert paused_run.state and link in (paused_run.state.message or "")
    run_id = find_version(f"{name}/1").run_id
    assert MlflowClient().get_run(run_id).info.status == "FINISHED"  # waiting is no run time
    assert run_id in references(open_bucket(), ()).in_force | references(open_bucket(), ()).running
    with get_client(sync_client=True) as client:
        assert client.read_global_concurrency_limit_by_name(limit_of(name)).active_slots == 0
    row = next(line for line in convoy("runs").stdout.splitlines() if run_id in line)
    assert row.rstrip().endswith("waits for approval")

    other = convoy(*common, *sets(*SETTINGS, "epochs=12"))
    assert other.status == 0, other.stderr
    assert aliased(name, "champion") == ModelVersion(name=name, version="2")

    assert answer(paused_run.id, ANN) == ""
    waited = time.monotonic() - since
    done = asked.wait(2 * PATIENCE)
    assert done.status == 3, done.stderr
    assert link in done.stderr and "waits for a person until" in done.stderr
    assert f"the quality gate refused: {name}/1" in done.complaint and f"against {name}/2" in done.complaint
    assert aliased(name, "champion") == ModelVersion(name=name, version="2")
    summary = json.loads(out.read_bytes())
    assert (summary["status"], summary["champion"]) == ("refused", False)
    assert summary["approval"] == "approved by Ann: looks right"
    took = paused_run.total_run_time.total_seconds()
    assert summary["total_seconds"] < took + waited / 2  # without the time of the other training


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_while_waiting_and_resumed(
    program: Callable[..., Program], convoy: Convoy, next_training: NextTraining, tmp_path: Path
) -> None:
    name, out = "kept-waiting", tmp_path / "out.json"
    asked = program("train", "--dataset", "digits", "--name", name, *sets(*SETTINGS, "approval=true"))
    killed = waiting_run(name)
    asked.end()
    run_id = find_version(f"{name}/1").run_id
    points = MlflowClient().get_metric_history(run_id, "work/train_seconds")
    assert len(points) == 1

    resumed = program("resume", run_id, "--summary", str(out))
    again = wait_for(lambda: other_run(run_id, killed), "the resumed flow run to wait", 2 * PATIENCE)
    refused = convoy("resume", run_id)
    assert refused.status == 2 and "another process works on run" in refused.complaint
    assert answer(again, ANN) == ""
    done = resumed.wait(2 * PATIENCE)
    assert done.status == 0, done.stderr
    assert f"{name} was promoted to version 1 by " in done.stderr and ", approved by Ann, at " in done.stderr
    assert "approval     approved by Ann: looks right" in done.stdout
    assert aliased(name, "champion") == ModelVersion(name=name, version="1")
    summary = json.loads(out.read_bytes())
    assert (summary["status"], summary["champion"]) == ("done", True)
    assert summary["approval"] == "approved by Ann: looks right"
    assert MlflowClient().get_metric_history(run_id, "work/train_seconds") == points
    assert_says(run_id, name, "approved by Ann: looks right", tmp_path)
    (entry,) = history(open_bucket(), name)
    assert entry.approved_by == "Ann" and entry.reason.endswith("; approved by Ann: looks right")
    assert "approved by Ann:" in convoy("history", name).stdout
    assert convoy("resume", run_id).complaint == f"run {run_id} has finished; there is nothing to resume"


def assert_says(run_id: str, name: str, decided: str, folder: Path) -> str:
    """Checks that card, verdict's page, report and the run's description have the decision; returns the report."""
    client = MlflowClient()
    assert f"**Approval**: {decided}." in client.get_model_version(name, "1").description
    page = Path(client.download_artifacts(run_id, "report/verdict.md", str(folder))).read_text()
    assert f"- **Approval**: {decided}." in page
    page = Path(client.download_artifacts(run_id, "report/index.html", str(folder))).read_text()
    assert f"<li>approval: {decided}</li>" in page
    assert f"- approval: {decided}" in client.get_run(run_id).data.tags["mlflow.note.content"]
    return page


def other_run(run_id: str, before: FlowRun) -> UUID | None:
    """Returns the flow run that works on a run if it waits and is not the one before."""
    flow_run = UUID(MlflowClient().get_run(run_id).data.tags["prefect.flow_run_id"])
    return flow_run if flow_run != before.id and paused(flow_run) else None


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_retraining_of_the_same_asks_once_and_keeps_to_the_answer(
    convoy: Convoy, stack: object, tmp_path: Path
) -> None:
    from flows.retrain import retrain_flow

    name = "asked-once"
    config = {"dataset": "digits", "name": name, "network": {"width": 4}, "epochs": 1, "ranks": 1, "batch_size": 64}
    config |= {"data": {"limit": 400}, "augment": {"shift": 0}, "serving": {"http": False}, "gate": GATE}
    run = RunConfig.model_validate({**config, "approval": True, "promote": True})
    answered: list[Summary] = []

    def person() -> None:
        first = waiting_run(name)
        answered.append(retrain_flow(run))  # as a second night would, while the first version waits
        assert answer(first.id, BOB) == ""

    thread = threading.Thread(target=contextvars.copy_context().run, args=(person,))
    thread.start()
    with pytest.raises(Refused) as refusal:
        retrain_flow(run)
    thread.join()
    refused = refusal.value.summary
    assert refused.status == "refused" and refused.error == f"{name}/1 was not approved: refused by Bob: too dark"
    assert answered[0].status == "unchanged"
    assert "version 1, with the same inputs: waiting for a person's decision, at http" in (answered[0].reason or "")
    third = retrain_flow(run)
    assert (third.status, third.reason) == ("unchanged", "version 1, with the same inputs: refused by Bob: too dark")
    run_id = find_version(f"{name}/1").run_id
    assert '<p class="large bad">Not approved</p>' in assert_says(run_id, name, "refused by Bob: too dark", tmp_path)
    tags = MlflowClient().get_model_version(name, "1").tags
    assert (tags["convoy.approval"], tags["convoy.approval_by"]) == ("refused", "Bob")
    shown = convoy("history", name).stdout
    assert f"{name} has no champion yet" in shown
    assert "version 1, not promoted: refused by Bob: too dark" in shown
    row = next(line for line in convoy("runs").stdout.splitlines() if run_id in line)
    assert row.rstrip().endswith("not approved")
