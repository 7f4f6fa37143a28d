"""Resumes trainings of deployments that ended without reporting a result; each worker does so beside its flow runs.

Flow runs die with their process or their machine, or give up in a long outage. A round, every minute, marks them as
crashed and asks Prefect for new runs of their deployments, which go on with the same MLflow run. Rounds of several
workers need no lease: of two requests with the same key, Prefect drops the second.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Literal
from uuid import UUID

import httpx
from prefect import get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import TERMINAL_STATES, FlowRun, StateType
from prefect.exceptions import PrefectException, PrefectHTTPStatusError

from flows.activity import activities, publish
from flows.run_names import reason_of
from infra.errors import Outage, ServiceError, UsageError, one_line
from infra.settings import Settings
from infra.storage.object_store import open_bucket
from infra.tracking import mlflow_runs, tags
from infra.tracking.provenance import COMMIT_VARIABLE
from tasks.config.run import RunConfig
from tasks.orchestration.flow_runs import (
    BEAT_SECONDS,
    DEAD,
    DEAD_FOR_AT_MOST,
    forget_killed,
    is_alive_here,
    killed_flow_runs,
    mark_dead,
    may_go_on,
    settle_killed_flow_runs,
    training_flow_runs,
)
from tasks.orchestration.messages import emit
from tasks.orchestration.model_lease import free_forgotten
from tasks.training.checkpoints import commits_of, finished_outcome
from tasks.training.runs.run_record import check_resumable, read_record, run_of_flow
from tasks.upkeep.doctor import close_run

CHECK_SECONDS = 300.0  # in which an import of the user's network, which may hang, must end
SILENCE_SECONDS = 10 * BEAT_SECONDS  # without a sign of life, until a flow run counts as dead
PENDING_SECONDS = 1800.0  # that a worker may take to start a flow run's process
CHECK = (
    "import json, sys; from tasks.training.runs.tracked_run import differs_here; "
    "print(json.dumps(differs_here(sys.argv[1], code=bool(sys.argv[2]))))"
)
MAX_DIFFERENCES = 500  # characters

Decision = Literal["leave", "resume", "give up"]


def tries_from(labels: Mapping[str, Any], committed: int) -> int:
    """Returns how many resumptions in a row have begun at the step of the newest checkpoint."""
    return int(labels.get(tags.RESUMED_TRIES, 0)) if labels.get(tags.RESUMED_STEP) == committed else 0


def decide(run: FlowRun, committed: int, limit: int) -> Decision:
    """Decides what becomes of a flow run.

    Args:
        committed: step of the newest checkpoint of its training; 0 without one.
        limit: resumptions in a row without a newer checkpoint.
    """
    if not may_go_on(run):
        return "leave"
    return "resume" if tries_from(run.labels, committed) < limit else "give up"


class Sweep:
    """Looks after the trainings of deployments in a work pool, one round per call.

    Args:
        pool: the work pool; workers of another one may have other credentials.
        queue: the work queue of workers that can give equal weights.
        report: receives a line about each thing that was done or could not be.
    """

    def __init__(self, pool: str, queue: str, report: Callable[[str], None]) -> None:
        self._pool, self._queue, self._report = pool, queue, report
        self._signs: dict[UUID, tuple[Any, float]] = {}
        self._elsewhere: set[UUID] = set()  # dead flow runs that cannot go on here
        self._told: set[str] = set()
        self._page: UUID | None = None

    def for_ever(self, pause: float) -> None:
        """Does a round every `pause` seconds, whatever goes wrong in one: nobody would notice if rounds ended."""
        while True:
            try:
                self()
            except Exception as error:
                self._tell(f"cannot look after trainings: {type(error).__name__}: {one_line(error)}")
            time.sleep(pause)

    def __call__(self) -> None:
        """Does a round. What fails in it is tried again in the next one."""
        if not self._done(self._mark_dead):
            self._signs.clear()  # signs of life were missed, too
        elif self._done(self._resume_dead):
            self._done(self._publish)

    def _done(self, part: Callable[[], None]) -> bool:
        """Does a part of a round; returns whether it succeeded, or says why not."""
        try:
            part()
        except (httpx.HTTPError, PrefectException, ServiceError) as error:
            self._tell(f"cannot look after trainings for now: {one_line(error)}")
            return False
        return True

    def _mark_dead(self) -> None:
        self._settle()
        with get_client(sync_client=True) as client:
            self._end_silent(client)

    def _resume_dead(self) -> None:
        with get_client(sync_client=True) as client:
            for run in list(self._runs(client, DEAD, ended_after=datetime.now(UTC) - DEAD_FOR_AT_MOST)):
                if not may_go_on(run) or run.id in self._elsewhere or is_alive_here(str(run.id)):
                    continue
                try:
                    self._look_at(client, run)
                except Outage:
                    raise
                except ServiceError as error:  # of this run only: above all its own network does not load here
                    self._tell(f"flow run {run.name} cannot go on here for now: {one_line(error)}")

    def _publish(self) -> None:
        page, self._page = self._page, None  # a new one if this fails: it may have been deleted
        self._page = publish(activities(), page)

    def _runs(self, client: SyncPrefectClient, states: Collection[StateType], **options: datetime) -> Iterator[FlowRun]:
        return (run for run in training_flow_runs(client, states, **options) if run.work_pool_name == self._pool)

    def _settle(self) -> None:
        """Marks what was killed on this machine as dead."""
        for killed in settle_killed_flow_runs():
            self._tell(f"the process of flow run {killed.name} was killed")
            if limit := killed.labels.get(tags.HELD_LEASE):
                free_forgotten(str(limit), after=timedelta(0))  # no need to wait until the lease expires
        for killed in killed_flow_runs():  # also those that Prefect has killed itself: it only calls them cancelled
            if killed.state_type in TERMINAL_STATES and self._close(killed):
                forget_killed(str(killed.id))  # since a person may run it again

    def _end_silent(self, client: SyncPrefectClient) -> None:
        """Marks flow runs of other machines as crashed if they have shown no sign of life for long.

        Only changes count, and only this process's clock, since clocks of machines differ. A flow run that runs and
        never gave a sign is left alone: an older Convoy runs it. One that a worker has taken may first install
        packages.
        """
        now, signs = time.monotonic(), dict[UUID, tuple[Any, float]]()
        for run in self._runs(client, [StateType.RUNNING, StateType.PAUSED, StateType.PENDING]):
            pending = run.state_type == StateType.PENDING
            sign, patience = run.labels.get(tags.ALIVE), SILENCE_SECONDS
            if pending:
                sign, patience = "pending", PENDING_SECONDS
            if run.deployment_id is None or sign is None or is_alive_here(str(run.id)):
                continue
            before, since = self._signs.get(run.id, (None, now))
            signs[run.id] = (sign, since if sign == before else now)
            if sign == before and now - since > patience:
                why = f"no sign of life for {patience / 60:.0f} minutes: its machine died, or lost its network"
                mark_dead(str(run.id), why)
                self._tell(f"flow run {run.name} is Crashed: {why}")
                self._close(run)
        self._signs = signs

    def _close(self, run: FlowRun) -> bool:
        """Closes the MLflow run of a dead flow run; returns whether that was possible."""
        try:
            if run_id := _mlflow_run(run):
                close_run(run_id, of=str(run.id))
        except ServiceError as error:  # of this run only: it may have been deleted in MLflow
            self._tell(f"cannot close the MLflow run of flow run {run.name} for now: {one_line(error)}")
            return False
        return True

    def _look_at(self, client: SyncPrefectClient, run: FlowRun) -> None:
        run_id = _mlflow_run(run)
        if run_id and tags.MLFLOW_RUN not in run.labels and mlflow_runs.run_status(run_id) == "FINISHED":
            run_id = run.parameters.get("resume")  # it has trained nothing, but judged an earlier version again
        parameters = {**run.parameters}
        try:
            if run_id:
                check_resumable(run_id, trial=tags.TRIAL in run.labels)
            given = run.parameters.get("config", {})
            config = read_record(run_id).config if run_id else RunConfig.model_validate(given)
            differing = _differences(run_id, code=tags.COMMIT not in run.labels) if run_id else ""
        except (UsageError, ValueError) as error:  # above all the record of another version of Convoy
            if run_id and mlflow_runs.run_status(run_id) == "FINISHED":
                client.update_flow_run_labels(run.id, {tags.RESUMED_BY: f"none: {one_line(error)}"})
            else:
                self._leave(run, one_line(error))
            return
        if differing:
            self._leave(run, f"its weights would differ: {differing}")
            return
        if run_id:
            parameters |= {"config": config.model_dump(mode="json", exclude_unset=True), "resume": run_id}
        step = _committed(run_id) if run_id else 0
        tries = tries_from(run.labels, step)
        decision = decide(run, step, config.resume.limit)
        if decision == "give up":
            why = f"it has ended {tries + 1} times in a row at step {step}" if tries else "resume.limit is 0"
            said = run.state.message if run.state else ""
            trial = tags.TRIAL in run.labels
            by_hand = f"\n`convoy resume {run_id}` tries again" if run_id and not trial else ""
            emit(client, "failed", f"flow run {run.name} is not resumed, since {why}: {said}{by_hand}", minor=trial)
            client.update_flow_run_labels(run.id, {tags.RESUMED_BY: f"none: {why}"})  # last, or nobody would be told
            self._tell(f"flow run {run.name} is not resumed: {why}")
        elif decision == "resume":
            self._resume(client, run, parameters, step, tries + 1)

    def _resume(
        self, client: SyncPrefectClient, run: FlowRun, parameters: dict[str, Any], step: int, tries: int
    ) -> None:
        assert run.deployment_id is not None
        if not may_go_on(client.read_flow_run(run.id)):  # a person has cancelled it, or another worker was faster
            return
        commit = run.labels.get(tags.COMMIT)
        variables = {**(run.job_variables or {})}
        if commit:  # a branch may have gone on
            variables["env"] = {**variables.get("env", {}), COMMIT_VARIABLE: commit}
        # With its checkpoint it needs the kind of machine on which `_differences` has found none.
        queue = self._queue if "resume" in parameters else run.work_queue_name
        labels: dict[str, Any] = {
            tags.STARTED_BY: reason_of(run),
            tags.RESUMES: str(run.id),
            tags.RESUMED_STEP: step,
            tags.RESUMED_TRIES: tries,
            **{name: run.labels[name] for name in (tags.TRIAL,) if name in run.labels},
        }
        try:
            made = client.create_flow_run_from_deployment(
                run.deployment_id,
                parameters=parameters,
                idempotency_key=f"resume-{run.id}",
                work_queue_name=queue,
                job_variables=variables or None,
                tags=run.tags,
                labels=labels,
            )
        except PrefectHTTPStatusError as error:  # above all a deployment of an earlier Convoy, without that parameter
            self._tell(
                f"Prefect does not take the resumption of {run.name}; `convoy deploy` may help: "
                f"{error.response.text[:300]}"
            )
            return
        client.update_flow_run_labels(run.id, {tags.RESUMED_BY: str(made.id)})
        where = f"from step {step}" if step else "from the beginning"
        self._tell(f"flow run {run.name} goes on {where} as a new run of its deployment")

    def _leave(self, run: FlowRun, why: str) -> None:
        """Leaves a dead flow run to other workers."""
        self._elsewhere.add(run.id)
        self._tell(f"flow run {run.name} cannot go on here: {why}")

    def _tell(self, line: str) -> None:
        if line not in self._told:  # most are true in each round
            self._report(line)
        self._told.add(line)


def _mlflow_run(run: FlowRun) -> str | None:
    """Returns the MLflow run that a flow run has worked on; None if it did not get so far."""
    known = run.labels.get(tags.MLFLOW_RUN) or run.parameters.get("resume")
    return str(known) if known else run_of_flow(str(run.id))


def _committed(run_id: str) -> int:
    """Returns the step up to which a training cannot be lost; 0 without a checkpoint."""
    store = open_bucket()
    if outcome := finished_outcome(store, run_id):
        return outcome.steps
    newest = next(commits_of(store, run_id), None)
    return newest.step if newest else 0


def _differences(run_id: str, *, code: bool) -> str:
    """Returns why a training cannot go on here with equal weights; empty if it can.

    A process of its own finds out: it loads PyTorch, and the network of one's own as the project has it now.

    Args:
        code: compare code and libraries too, and not only the machine.

    Raises:
        ServiceError: it could not be found out.
    """
    command = [sys.executable, "-c", CHECK, run_id, "code" * code]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            cwd=Settings().project,
            timeout=CHECK_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise ServiceError(f"the check has not ended after {CHECK_SECONDS:g} s") from error
    if done.returncode:
        raise ServiceError(one_line(done.stderr.strip().rpartition("\n")[2])[:MAX_DIFFERENCES])
    return "; ".join(json.loads(done.stdout.strip().rpartition("\n")[2]))[:MAX_DIFFERENCES]
