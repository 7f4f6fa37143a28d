"""Asks workers to try the code of a commit, and to judge it: two flow runs, one after the other."""

import re
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from prefect import get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.responses import DeploymentResponse
from prefect.exceptions import ObjectNotFound

from flows.deployed_runs import cancel_flow_run, find_deployment, follow, start
from flows.deployments import job_variables
from flows.run_names import model_name, with_name
from flows.summary import Summary
from infra.errors import UsageError
from infra.tracking.tags import COMMIT, RESUMES, TRIAL
from tasks.config.deployment import CodeConfig
from tasks.config.run import RunConfig, load_config
from tasks.orchestration.flow_runs import DEAD, DEAD_FOR_AT_MOST, may_go_on, training_flow_runs

LIVE = [StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING, StateType.PAUSED]
FULL_NAME = re.compile(r"[0-9a-f]{40}")  # of a commit
JUDGED = ("status", "error", "exit_status", "verdict", "gain")


def try_commit(
    deployment: str | None,
    settings: list[str],
    code: CodeConfig,
    *,
    config: RunConfig | None = None,
    key: str | None = None,
    report: Callable[[str], None],
) -> tuple[Summary, list[str]]:
    """Has a commit tried and judged; returns the summary, and the pages for a report.

    Args:
        deployment: NAME of `trial/NAME-trial` and `judge/NAME-judge`, or `retrain/NAME`. None: the name of the model of
            `config`.
        settings: `key=value` texts that change the trial's configuration; the gate stays the deployment's.
        config: takes the place of the trial's configuration; the settings are in it already.
        key: name of what the commit is tried for. Unfinished trials of other commits with this key are cancelled. One
            of the same commit, given by its full name, with the same configuration is followed.
        report: is called with one line at each change.

    Raises:
        UsageError: there are no such deployments, or a setting cannot be used.
        ServiceError: Prefect refuses a run, or did not answer for long.
    """
    name = (deployment or model_name(config or RunConfig())).rpartition("/")[2]
    with get_client(sync_client=True) as client:
        trial, judge = (find_deployment(client, f"{flow}/{name}-{flow}") for flow in ("trial", "judge"))
        if config is None:
            config = load_config(None, settings, base=trial.parameters.get("config", {}))
        parameters: dict[str, Any] = {"config": with_name(config).model_dump(mode="json", exclude_unset=True)}
        running = _supersede(client, trial, key, code, parameters, report) if key else None
        label = {TRIAL: key or str(code.ref)}
        if running is None:
            started = start(client, trial, parameters, code=code, labels=label)
            report(f"flow run {started.url}")
            running = started.id
    tried, pages = follow(running, report)
    tried = tried.model_copy(update={"trial": True})
    if tried.status != "done" or not tried.mlflow_run_id:
        return tried, pages
    with get_client(sync_client=True) as client:
        parameters = {"config": judge.parameters.get("config", {}), "run": tried.mlflow_run_id}
        judging = start(client, judge, parameters, labels=label)
    report(f"it is judged by flow run {judging.url}")
    judged, verdict = follow(judging.id, report)
    outcome: dict[str, Any] = {name: getattr(judged, name) for name in JUDGED}
    if judged.accuracy is not None:
        outcome["accuracy"] = judged.accuracy  # as computed by the installed code
    return tried.model_copy(update=outcome), [*verdict, *pages]


def _supersede(
    client: SyncPrefectClient,
    deployment: DeploymentResponse,
    key: str,
    code: CodeConfig,
    parameters: dict[str, Any],
    report: Callable[[str], None],
) -> UUID | None:
    """Cancels the unfinished trials with a key that would not answer this request; returns one that will, if any."""
    same: UUID | None = None
    lately = datetime.now(UTC) - DEAD_FOR_AT_MOST
    for run in [*training_flow_runs(client, LIVE), *training_flow_runs(client, DEAD, ended_after=lately)]:
        unfinished = run.state_type in LIVE or may_go_on(run)
        if not unfinished or run.deployment_id != deployment.id or run.labels.get(TRIAL) != key:
            continue
        if _tries(_first(client, run), code, parameters):
            same = run.id
            continue
        with suppress(UsageError):  # it has ended
            report(cancel_flow_run(client, run, f"commit {code.ref} is tried instead"))
    return same


def _first(client: SyncPrefectClient, run: FlowRun) -> FlowRun:
    """Returns the flow run that a resumed one goes on with: it has the configuration as it was asked for."""
    with suppress(ObjectNotFound):
        while resumed := run.labels.get(RESUMES):
            run = client.read_flow_run(UUID(str(resumed)))
    return run


def _tries(run: FlowRun, code: CodeConfig, parameters: dict[str, Any]) -> bool:
    """Returns whether a flow run tries this commit with this configuration; a branch may have gone on since."""
    if not FULL_NAME.fullmatch(str(code.ref)) or run.parameters.get("config") != parameters["config"]:
        return False
    wanted, given = job_variables(code), run.job_variables or {}
    return run.labels.get(COMMIT, code.ref) == code.ref and given.get("env") == wanted["env"]
