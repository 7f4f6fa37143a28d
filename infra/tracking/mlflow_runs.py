"""Opens, writes, finds and closes MLflow runs. A training has one run, which its flow opens and closes.

MLflow's global "active run" is never used.
"""

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import mlflow
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException, RestException

from infra.errors import UsageError
from infra.records import Record
from infra.tracking.client import all_pages, check_server, mlflow_client, none_if_missing, page_url, tracking_uri
from infra.tracking.names import filter_of
from infra.tracking.tags import CONTEXT, DIGEST, MODEL_VERSION, VERDICT

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

# MLflow's limits
PARAMS_PER_CALL, PARAM_CHARACTERS, DATASET_DIGEST_CHARACTERS = 100, 6000, 36
RUNS_PER_CALL = EXPERIMENTS_PER_CALL = 1000

VIEW = "convoy"  # the view of the list of runs, which MLflow reads from a tag of the experiment
COLUMN_PIXELS = {
    "metrics.`test/accuracy`": 104,
    "metrics.`val/accuracy`": 96,
    f"tags.`{VERDICT}`": 116,
    f"tags.`{MODEL_VERSION}`": 110,
    "attributes.`Dataset`": 130,
    "metrics.`train/images_per_second`": 110,
    "attributes.`User`": 96,
}
"""The columns of the view, in their order; all fit a screen 1920 pixels wide, the first three one of 1280."""

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]


def start_run(
    experiment: str,
    run_name: str,
    params: Mapping[str, str | int | float | bool | None],
    tags: Mapping[str, str],
) -> str:
    """Opens a run, in an experiment that is created if it does not exist, and returns the run's id.

    Raises:
        ServiceError: the server cannot be reached, or refuses; no run stays open.
        UsageError: the experiment was deleted.
    """
    check_server()
    with mlflow_client(f"start a run in experiment {experiment!r}") as client:
        run = client.create_run(_experiment_id(client, experiment), run_name=run_name, tags=dict(tags))
        run_id = str(run.info.run_id)
        try:
            values = [Param(name, str(value)[:PARAM_CHARACTERS]) for name, value in params.items()]
            for start in range(0, len(values), PARAMS_PER_CALL):
                client.log_batch(run_id, params=values[start : start + PARAMS_PER_CALL])
        except BaseException:
            with suppress(MlflowException):  # the first error is the one to report
                client.set_terminated(run_id, "FAILED")
            raise
    return run_id


def _experiment_id(client: mlflow.MlflowClient, name: str) -> str:
    view = {"selectedColumns": list(COLUMN_PIXELS), "columnOrder": list(COLUMN_PIXELS), "columnWidths": COLUMN_PIXELS}
    tags = {f"mlflow.sharedViewState.{VIEW}": json.dumps(view)}
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            # MLflow 3.17's pages ignore the kind: `page_url` chooses their view.
            kind = {"mlflow.experimentKind": "custom_model_development"}
            return str(client.create_experiment(name, tags={**kind, **tags}))
        except RestException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)  # which another process created meanwhile
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise UsageError(f"MLflow experiment {name!r} was deleted; restore it in MLflow, or choose another name")
    for key, value in tags.items():
        if found.tags.get(key) != value:  # an experiment that an earlier Convoy, or a user, has created
            client.set_experiment_tag(found.experiment_id, key, value)
    return str(found.experiment_id)


def reopen_run(run_id: str) -> None:
    """Reopens a run that has ended.

    Raises:
        ServiceError: the server cannot be reached, or has no such run.
    """
    with mlflow_client(f"open run {run_id} again") as client:
        client.update_run(run_id, status="RUNNING")


def run_status(run_id: str) -> str:
    """Returns MLflow's status: RUNNING, FINISHED, FAILED or KILLED."""
    with mlflow_client(f"find run {run_id}") as client:
        return str(client.get_run(run_id).info.status)


def run_tags(run_id: str) -> dict[str, str]:
    """Returns a run's tags; empty if there is no such run."""
    with mlflow_client(f"find run {run_id}") as client:
        run = none_if_missing(client.get_run, run_id)
    return dict(run.data.tags) if run else {}


class Run(Record):
    """A run in a list of runs."""

    run_id: str
    status: str
    """RUNNING, FINISHED, FAILED or KILLED."""

    started: datetime
    tags: dict[str, str]
    metrics: dict[str, float]


def search_runs(tag: str, value: str | None = None, *, running: bool = False, limit: int | None = None) -> list[Run]:
    """Returns the runs of all experiments that have a tag (with this value, if given), newest first.

    Args:
        running: only those with the status RUNNING.
    """
    condition = f"tags.`{tag}` != ''" if value is None else filter_of(**{f"tags.{tag}": value})
    if running:
        condition += f" and {filter_of(status='RUNNING')}"
    with mlflow_client("list the runs") as client:
        experiments = all_pages(client.search_experiments, max_results=EXPERIMENTS_PER_CALL)
        found = all_pages(
            client.search_runs,
            limit=limit,
            experiment_ids=[experiment.experiment_id for experiment in experiments],
            filter_string=condition,
            max_results=min(RUNS_PER_CALL, limit or RUNS_PER_CALL),
            order_by=["attributes.start_time DESC"],
        )
    return [
        Run(
            run_id=run.info.run_id,
            status=run.info.status,
            started=datetime.fromtimestamp(run.info.start_time / 1000, tz=UTC),
            tags=run.data.tags,
            metrics=run.data.metrics,
        )
        for run in found[:limit]
    ]


def end_run(run_id: str, status: RunStatus) -> None:
    """Closes a run."""
    with mlflow_client(f"close run {run_id}") as client:
        client.set_terminated(run_id, status)


def run_url(run_id: str, page: str = "") -> str:
    """Returns the address of a run in MLflow, or of one of its pages, such as `model-metrics`."""
    return page_url(f"experiments/{_experiment_of(tracking_uri(), run_id)}/runs/{run_id}{page and '/' + page}")


def report_url(run_id: str) -> str:
    """Returns the address of the report of a run's version."""
    return run_url(run_id, "artifacts/report/index.html")


def runs_url(run_id: str) -> str:
    """Returns the address of the list of all runs of a run's experiment, with Convoy's columns."""
    return page_url(f"experiments/{_experiment_of(tracking_uri(), run_id)}/runs", viewStateShareKey=VIEW)


@lru_cache(maxsize=64)  # a run's experiment never changes
def _experiment_of(server: str, run_id: str) -> str:
    with mlflow_client(f"find run {run_id}") as client:
        return str(client.get_run(run_id).info.experiment_id)


def log_dataset(run_id: str, name: str, digest: str, source: str, context: str = "training") -> None:
    """Records the dataset version that a run uses.

    MLflow keeps 36 characters of a digest; the tag `convoy.digest` of the run's input has all of it.

    Args:
        source: address of the data, for example `s3://bucket/datasets/<version>/manifest.json`.
        context: the purpose of the data in the run.
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
    """Sets tags of a run, and replaces existing values."""
    with mlflow_client(f"tag run {run_id}") as client:
        client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])


def fetch_artifacts(run_id: str, path: str, folder: Path) -> Path:
    """Downloads a folder of a run's artifacts into a local one; returns its local path."""
    with mlflow_client(f"fetch {path} of run {run_id}") as client:
        return Path(client.download_artifacts(run_id, path, str(folder)))


def log_metrics(run_id: str, metrics: Mapping[str, float], *, step: int = 0) -> None:
    """Logs a few final metrics, except those that the run already has from before a resume.

    A repeated measurement, such as seconds, may differ; the first value stays. Metrics of a running training go through
    a `MetricLogger`.
    """
    now = time.time_ns() // 1_000_000
    with mlflow_client(f"log metrics of run {run_id}") as client:
        there = client.get_run(run_id).data.metrics
        new = [Metric(name, value, now, step) for name, value in metrics.items() if name not in there]
        if new:
            client.log_batch(run_id, new)


def log_file(run_id: str, path: Path, artifact_dir: str = "") -> None:
    """Uploads a local file to a run's artifacts."""
    with mlflow_client(f"store {path.name} of run {run_id}") as client:
        client.log_artifact(run_id, str(path), artifact_dir or None)


def log_text(run_id: str, artifact: str, text: str) -> None:
    """Writes a text as an artifact of a run, at a path such as `report/evaluation.json`."""
    with mlflow_client(f"store {artifact} of run {run_id}") as client:
        client.log_text(run_id, text, artifact)


def log_figure(run_id: str, artifact: str, figure: "Figure") -> None:
    """Writes a matplotlib figure as an image artifact, in the format of the path's suffix."""
    with mlflow_client(f"store {artifact} of run {run_id}") as client:
        client.log_figure(run_id, figure, artifact, save_kwargs={"dpi": 150, "bbox_inches": "tight"})


def log_image(run_id: str, artifact: str, image: "Image") -> None:
    """Writes a Pillow image as an artifact of a run, in the format of the path's suffix."""
    with mlflow_client(f"store {artifact} of run {run_id}") as client:
        client.log_image(run_id, image, artifact)
