"""Asks workers to try the code of a commit, and to judge it: two flow runs, one after the other."""

from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from uuid import UUID

from prefect import get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.responses import DeploymentResponse

from flows.deployments import Started, cancel_flow_run, find_deployment, follow, start
from flows.run_names import model_name
from flows.summary import Summary
from infra.errors import UsageError
from infra.tracking.provenance import COMMIT_VARIABLE
from infra.tracking.tags import TRIAL
from tasks.config.deployment import CodeConfig
from tasks.config.run import RunConfig, load_config
from tasks.orchestration.flow_runs import training_flow_runs

LIVE = [StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING, StateType.PAUSED]
DEAD = [StateType.CRASHED, StateType.FAILED]  # which a worker may go on with
MAX_AGE = timedelta(days=7)  # of trials that are superseded


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
        deployment: the name of `trial/NAME` and `judge/NAME`; a flow's name before it does not count. None: that of the
            model of `config`.
        settings: `key=value` texts that change the trial's configuration; the gate stays the deployment's.
        config: takes the place of the trial's configuration; the settings are in it already.
        key: what the commit is tried for. Unfinished trials of other commits for the same are cancelled, and one of
            this commit is followed.
        report: is called with one line at each change.

    Raises:
        UsageError: there are no such deployments, or a setting cannot be used.
        ServiceError: Prefect refuses a run, or did not answer for long.
    """
    name = (deployment or model_name(config or RunConfig())).rpartition("/")[2]
    with get_client(sync_client=True) as client:
        trial, judge = (find_deployment(client, f"{flow}/{name}") for flow in ("trial", "judge"))
        if config is None:
            config = load_config(None, settings, base=trial.parameters.get("config", {}))
        running = _supersede(client, trial, key, str(code.ref), report) if key else None
        if running is None:
            parameters = {"config": config.model_dump(mode="json", exclude_unset=True)}
            started = start(client, trial, parameters, code=code, labels={TRIAL: key or str(code.ref)})
            report(f"flow run {started.url}")
            running = started.id
    tried, pages = follow(running, report)
    if tried.status != "done" or not tried.mlflow_run_id:
        return tried, pages
    with get_client(sync_client=True) as client:
        judging: Started = start(client, judge, {"config": judge.parameters["config"], "run": tried.mlflow_run_id})
    report(f"it is judged by flow run {judging.url}")
    judged, verdict = follow(judging.id, report)
    outcome = {each: getattr(judged, each) for each in ("status", "error", "exit_status", "verdict", "gain")}
    return tried.model_copy(update=outcome), [*verdict, *pages]


def _supersede(
    client: SyncPrefectClient, deployment: DeploymentResponse, key: str, ref: str, report: Callable[[str], None]
) -> UUID | None:
    """Cancels the trials of other commits for the same; returns the unfinished trial of this commit, if any."""
    same: UUID | None = None
    for run in list(training_flow_runs(client, [*LIVE, *DEAD], after=datetime.now(UTC) - MAX_AGE)):
        if run.deployment_id != deployment.id or run.labels.get(TRIAL) != key:
            continue
        variables = (run.job_variables or {}).get("env", {})
        if variables.get(COMMIT_VARIABLE) == ref:
            same = run.id if run.state_type in LIVE else same
            continue
        with suppress(UsageError):  # it has ended
            report(cancel_flow_run(client, run, f"commit {ref} is tried instead"))
    return same
