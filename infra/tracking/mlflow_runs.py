"""MLflow runs: one for each training, opened by the flow, written by it and by rank 0, closed by the flow.

Nothing here uses MLflow's global "active run".
"""

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal

import mlflow
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException, RestException
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE

from infra.errors import UsageError
from infra.records import Record
from infra.tracking.client import check_server, is_missing, mlflow_client, tracking_uri
from infra.tracking.names import filter_of
from infra.tracking.tags import CONTEXT, DIGEST

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARAMS_A_CALL, PARAM_CHARACTERS = 100, 6000  # MLflow's limits
DATASET_DIGEST_CHARACTERS = 36  # likewise
RUNS_A_CALL = EXPERIMENTS_A_CALL = 1000

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]


def start_run(
    experiment: str,
    run_name: str,
    params: Mapping[str, str | int | float | bool | None],
    tags: Mapping[str, str],
) -> str:
    """Open a run, in an experiment that is created if there is none of that name, and return its id.

    Raises:
        ServiceError: the server cannot be reached, or refuses; no run is left open.
        UsageError: the experiment was deleted.
    """
    check_server()
    with mlflow_client(f"start a run in experiment {experiment!r}") as client:
        run_id: str = client.create_run(
            _experiment_id(client, experiment), run_name=run_name, tags=dict(tags)
        ).info.run_id
        try:
            values = [Param(name, str(value)[:PARAM_CHARACTERS]) for name, value in params.items()]
            for start in range(0, len(values), PARAMS_A_CALL):
                client.log_batch(run_id, params=values[start : start + PARAMS_A_CALL])
        except BaseException:
            with suppress(MlflowException):  # what went wrong first is what should be known
                client.set_terminated(run_id, "FAILED")
            raise
    return run_id


def _experiment_id(client: mlflow.MlflowClient, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            # The kind decides which of its two faces MLflow shows: for training, rather than for prompts and traces.
            return str(client.create_experiment(name, tags={"mlflow.experimentKind": "custom_model_development"}))
        except RestException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)  # another process was faster
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise UsageError(f"MLflow experiment {name!r} was deleted; restore it there, or choose another name")
    return str(found.experiment_id)


def reopen_run(run_id: str) -> None:
    """Have a run that has ended go on.

    Raises:
        ServiceError: the server cannot be reached, or has no such run.
    """
    check_server()
    with mlflow_client(f"open run {run_id} again") as client:
        client.update_run(run_id, status="RUNNING")


def run_status(run_id: str) -> str:
    """MLflow's: RUNNING, FINISHED, FAILED, KILLED."""
    with mlflow_client(f"find run {run_id}") as client:
        return str(client.get_run(run_id).info.status)


def run_tags(run_id: str) -> dict[str, str]:
    """Tags of a run; none if there is no such run."""
    with mlflow_client(f"find run {run_id}") as client:
        try:
            return dict(client.get_run(run_id).data.tags)
        except RestException as error:
            if not is_missing(error):
                raise
            return {}


class Run(Record):
    """A run, as lists show it."""

    run_id: str
    status: str
    """MLflow's: RUNNING, FINISHED, FAILED, KILLED."""

    started: datetime
    tags: dict[str, str]
    metrics: dict[str, float]


def search_runs(tag: str, value: str | None = None, *, limit: int | None = None) -> list[Run]:
    """Returns the runs of all experiments that have a tag (of this value, if one is given), the newest first."""
    condition = f"tags.`{tag}` != ''" if value is None else filter_of(**{f"tags.{tag}": value})
    found: list[Run] = []
    with mlflow_client("list the runs") as client:
        experiments = _experiments(client)
        token: str | None = None
        while experiments:
            page = client.search_runs(
                experiments,
                condition,
                max_results=min(RUNS_A_CALL, limit or RUNS_A_CALL),
                order_by=["attributes.start_time DESC"],
                page_token=token,
            )
            found += [
                Run(
                    run_id=run.info.run_id,
                    status=run.info.status,
                    started=datetime.fromtimestamp(run.info.start_time / 1000, tz=UTC),
                    tags=run.data.tags,
                    metrics=run.data.metrics,
                )
                for run in page
            ]
            token = page.token
            if not token or (limit and len(found) >= limit):
                break
    return found[:limit]


def _experiments(client: mlflow.MlflowClient) -> list[str]:
    """Ids of all experiments: MLflow lists them page by page."""
    found: list[str] = []
    token: str | None = None
    while True:
        page = client.search_experiments(max_results=EXPERIMENTS_A_CALL, page_token=token)
        found += [experiment.experiment_id for experiment in page]
        token = page.token
        if not token:
            return found


def end_run(run_id: str, status: RunStatus) -> None:
    """Close a run, now."""
    with mlflow_client(f"close run {run_id}") as client:
        client.set_terminated(run_id, status)


def run_url(run_id: str) -> str:
    """The address of a run in MLflow's web pages."""
    return f"{tracking_uri()}/#/experiments/{_experiment_of(tracking_uri(), run_id)}/runs/{run_id}"


@lru_cache(maxsize=64)  # a run never changes it
def _experiment_of(server: str, run_id: str) -> str:
    with mlflow_client(f"find run {run_id}") as client:
        return str(client.get_run(run_id).info.experiment_id)


def log_dataset(run_id: str, name: str, digest: str, source: str, context: str = "training") -> None:
    """Name the dataset version that a run uses.

    MLflow keeps 36 characters of a digest; the whole one is a tag of the run's input, `convoy.digest`.

    Args:
        source: address of the data, for example `s3://bucket/datasets/<version>/manifest.json`.
        context: what the run uses it for.
    """
    dataset = Dataset(
        name=name,
        digest=digest[:DATASET_DIGEST_CHARACTERS],
        source_type=source.partition(":")[0],
        source=json.dumps({"uri": source}),
    )
    tags = [InputTag(CONTEXT, context), InputTag(DIGEST, digest)]
    with mlflow_client(f"log the dataset of run {run_id}") as client:
        client.log_inputs(run_id, datasets=[DatasetInput(dataset, tags)])


def set_tags(run_id: str, tags: Mapping[str, str]) -> None:
    """Set tags of a run; a tag that is there already gets the new value."""
    with mlflow_client(f"tag run {run_id}") as client:
        client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])


def describe_run(run_id: str, markdown: str) -> None:
    """Set the description that a run's page shows above all else."""
    set_tags(run_id, {MLFLOW_RUN_NOTE: markdown})


def fetch_artifacts(run_id: str, path: str, folder: Path) -> Path:
    """Download a folder of a run's artifacts into a local one; returns where it is then."""
    with mlflow_client(f"fetch {path} of run {run_id}") as client:
        return Path(client.download_artifacts(run_id, path, str(folder)))


def log_metrics(run_id: str, metrics: Mapping[str, float], *, step: int = 0) -> None:
    """Logs a few final figures at once, except those whose names the run has already, from before a resume.

    What was measured anew, such as seconds, may differ; the first figure stays. Figures of a running training go
    through a `MetricLogger`.
    """
    now = time.time_ns() // 1_000_000
    with mlflow_client(f"log metrics of run {run_id}") as client:
        there = client.get_run(run_id).data.metrics
        new = [Metric(name, value, now, step) for name, value in metrics.items() if name not in there]
        if new:
            client.log_batch(run_id, new)


def log_file(run_id: str, path: Path, artifact_dir: str = "") -> None:
    """Upload a local file to a run's artifacts."""
    with mlflow_client(f"store {path.name} of run {run_id}") as client:
        client.log_artifact(run_id, str(path), artifact_dir or None)


def log_text(run_id: str, artifact: str, text: str) -> None:
    """Write a text as an artifact of a run, at a path such as `report/evaluation.json`."""
    with mlflow_client(f"store {artifact} of run {run_id}") as client:
        client.log_text(run_id, text, artifact)


def log_figure(run_id: str, artifact: str, figure: "Figure") -> None:
    """Draw a matplotlib figure as an image artifact; the path's ending says in what format."""
    assert PurePosixPath(artifact).suffix
    with mlflow_client(f"store {artifact} of run {run_id}") as client:
        client.log_figure(run_id, figure, artifact, save_kwargs={"dpi": 150, "bbox_inches": "tight"})
