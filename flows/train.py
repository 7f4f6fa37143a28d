"""The training flow: download, preprocess, train, evaluate, register, verify."""

import time

from prefect import flow, states
from prefect.runtime import flow_run
from prefect.utilities.urls import url_for

from flows.summary import Summary
from infra import tracking
from tasks.cancel import Cancelled
from tasks.config import RunConfig
from tasks.download import download
from tasks.evaluate import evaluate
from tasks.preprocess import preprocess
from tasks.pretrained import pretrained
from tasks.register import register
from tasks.run import fitted, read_record, recorded_dataset, tracked_run
from tasks.train import train
from tasks.verify import verify


@flow(name="train", flow_run_name="{config.dataset} {config.model}", persist_result=False)
def train_flow(config: RunConfig, refresh: frozenset[str] = frozenset(), resume: str | None = None) -> Summary:
    """Train a network on a dataset and register it.

    Args:
        config: what to train on, and how.
        refresh: steps (`download`, `preprocess`) to do anew although their output exists.
        resume: id of the MLflow run of an earlier, unfinished training to go on with.
    """
    began = time.monotonic()
    tracking.check_server()  # before hours of work, rather than after
    reused: tuple[str, ...]
    if resume:
        dataset, reused = recorded_dataset(read_record(resume)), ("download", "preprocess")
    else:
        source = download(config.dataset, refresh="download" in refresh)
        dataset = preprocess(source, config.data, refresh="preprocess" in refresh)
        reused = tuple(step for step, output in (("download", source), ("preprocess", dataset)) if output.reused)
        config = fitted(config, dataset)
        if config.pretrained:
            config = pretrained(config, dataset)
    try:
        with tracked_run(config, dataset, resume) as run:
            trained = train(run, dataset, config)
            evaluated = evaluate(config.training(), dataset, trained)
            registered = register(config.name or dataset.name, config.training(), dataset, trained, evaluated)
            verify(registered, evaluated)
    except Cancelled as cancelled:
        # Prefect lets a cancelled run end in this state only; the caller is raised `cancelled` from it.
        return states.Cancelled(message=str(cancelled), data=cancelled)  # type: ignore[return-value]
    return Summary(
        status="done",
        accuracy=evaluated.accuracy,
        weights_sha256=trained.weights_sha256,
        dataset=config.dataset,
        dataset_version=dataset.version,
        model_name=registered.name,
        model_version=registered.version,
        world_size=trained.world_size,
        train_seconds=round(trained.train_seconds, 3),
        total_seconds=round(time.monotonic() - began, 3),
        images_per_second=round(trained.images_per_second, 1),
        mlflow_tracking_uri=tracking.tracking_uri(),
        mlflow_run_id=run.run_id,
        mlflow_run_url=run.url,
        prefect_flow_run_id=flow_run.id,
        prefect_flow_run_url=url_for("flow-run", obj_id=flow_run.id),
        checkpoint_prefix=run.checkpoint_prefix,
        reused=reused,
    )
