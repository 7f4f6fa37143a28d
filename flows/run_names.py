"""Names flow runs after the model, the network and the reason why they run."""

import os
from pathlib import Path
from typing import Literal, get_args
from urllib.parse import unquote, urlsplit

from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext

from infra.sources.entries import METADATA, stem
from infra.sources.slug import slug
from infra.tracking.tags import RESUMES, STARTED_BY
from tasks.config.run import RunConfig
from tasks.orchestration.flow_runs import TRIAL_FLOWS

Reason = Literal["schedule", "event", "CI", "by hand"]
_REASONS: dict[object, Reason] = {reason: reason for reason in get_args(Reason)}


def training_name() -> str:
    """Returns the name of a run that trains or judges: `digits convoy9 (by hand)`, `digits convoy9 (trial, CI)`."""
    run, parameters = _run(), _run().parameters or {}
    config = RunConfig.model_validate(parameters["config"])
    flow = f"{run.flow.name}, " if run.flow and run.flow.name in TRIAL_FLOWS else ""
    resumed = "resumed " if parameters.get("resume") else ""
    return f"{model_name(config)} {config.model} ({flow}{resumed}{_why()})"


def prediction_name() -> str:
    """Returns the name of a run of `predict`: `digits/2 (by hand)`."""
    return f"{(_run().parameters or {})['model']} ({_why()})"


def pruning_name() -> str:
    """Returns the name of a run of `prune`: `storage (schedule)`."""
    return f"storage ({_why()})"


def model_name(config: RunConfig) -> str:
    """Returns the name of the model that a configuration trains, without reading the data."""
    if config.name:
        return config.name
    path = os.path.expanduser(config.dataset.removeprefix("file:"))
    if path.startswith(("http://", "https://")):
        path = unquote(urlsplit(path).path)
    last = os.path.basename(path.rstrip("/"))
    if last == METADATA:
        path = os.path.dirname(path) or "."
        last = os.path.basename(path)
    elif not os.path.isdir(path):
        last = stem(last)
    if not last.strip("."):  # the working folder, or the one above
        last = os.path.basename(os.path.abspath(path))
    return slug(last)


def with_name(config: RunConfig) -> RunConfig:
    """Returns a configuration for workers: with its name if that is the working folder's, since theirs differs."""
    if config.name or Path(config.dataset).name not in ("", "..", METADATA):
        return config
    return config.model_copy(update={"name": model_name(config)})


def command_reason() -> Reason:
    """Returns the reason of a command that a person or CI has called."""
    return "CI" if os.environ.get("CI", "").lower() not in ("", "0", "false") else "by hand"


def reason_of(run: FlowRun) -> Reason:
    """Returns why a flow run runs; of one without a deployment, which runs in this process, this process knows it."""
    if run.labels.get(RESUMES) and (reason := _REASONS.get(run.labels.get(STARTED_BY))):
        return reason
    if run.auto_scheduled:
        return "schedule"
    if run.created_by and run.created_by.type == "AUTOMATION":
        return "event"
    if run.deployment_id is None:
        return command_reason()
    return "CI" if run.labels.get(STARTED_BY) == "CI" else "by hand"


def _why() -> Reason:
    run = _run().flow_run
    assert run is not None
    return reason_of(run)


def _run() -> FlowRunContext:
    """Returns the context of the flow run, which exists before Prefect asks for the name."""
    context = FlowRunContext.get()
    assert context is not None
    return context
