"""The serving gate: the registered version, used as strangers use it, must say what the evaluated network said."""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from threading import Event

import httpx
import torch
from prefect.artifacts import create_markdown_artifact
from torch import Tensor

from infra.errors import GateRefused, one_line
from infra.records import Record
from infra.storage.object_store import open_bucket
from infra.tracking import mlflow_runs
from infra.tracking.model_registry import ModelVersion, set_alias, tag_version
from infra.tracking.tags import SERVING
from tasks.config.gates import ServingConfig
from tasks.evaluation.evaluate import Evaluation
from tasks.evaluation.reference_images import load_reference
from tasks.orchestration.cancellation import stop_if_cancelled
from tasks.orchestration.progress import run_logger
from tasks.orchestration.step import step
from tasks.release.serving.clients import Consumer, ConsumerFailed, Server, batch_sizes, http_server, post_images
from tasks.reporting.markdown import Markup, plain, table

CHALLENGER = "challenger"
TOLERANCE = {"cpu": 1e-5, "cuda": 1e-3}
"""Largest difference of a probability, by the device of the evaluation: round-off, with TF32's on a GPU."""


class ServingCheck(Record):
    """One thing that was tried."""

    name: str
    passed: bool
    detail: str
    """The numbers, or the model's own words."""


class ServingReport(Record):
    """What the gate found."""

    model: str
    """`models:/name/version`."""

    tolerance: float
    checks: tuple[ServingCheck, ...]

    @property
    def passed(self) -> bool:
        """Whether every check did."""
        return all(check.passed for check in self.checks)

    def markdown(self) -> str:
        """The report for people."""
        rows = ((check.name, "passed" if check.passed else Markup("**failed**"), check.detail) for check in self.checks)
        head = f"Serving gate of {plain(self.model)}: **{'passed' if self.passed else 'refused'}**"
        return "\n".join([head, "", *table(("check", "result", "found"), rows, "lll"), ""])


class ServingRefused(GateRefused):
    """The registered version does not serve what was evaluated."""


@step("serving-gate")
def serving_gate(
    registered: ModelVersion,
    evaluated: Evaluation,
    config: ServingConfig,
    consumer: Consumer | None = None,
    server: Server | None = None,
) -> ServingReport:
    """Use the version as a consumer would, and only then point `challenger` at it.

    Raw images go in, in batches of 1, 3 and 64, through `mlflow.pyfunc` in a fresh process and over HTTP; so do inputs
    of wrong shapes and types, which must be refused. The report goes to the MLflow run (`report/serving.json`), to
    Prefect, and as tag `convoy.serving` to the version. A version that fails stays for inspection, without an alias.

    Args:
        consumer: the fresh process to use; None, or a used one, starts another.
        server: likewise.

    Raises:
        Cancelled: the flow run was cancelled.
        ServingRefused: it failed; after the report was published.
        ServiceError: a server failed.
    """
    stop_if_cancelled()
    reference = load_reference(open_bucket(), evaluated.reference_key)
    tolerance = config.tolerance or TOLERANCE[evaluated.device]
    with ExitStack() as started:
        if consumer is None or not consumer.is_waiting:
            consumer = started.enter_context(Consumer())
        report = try_serving(
            registered, reference["images"], reference["probabilities"], tolerance, config, consumer, server
        )
    mlflow_runs.log_text(evaluated.run_id, "report/serving.json", report.model_dump_json(indent=2))
    mlflow_runs.log_text(evaluated.run_id, "report/serving.md", report.markdown())
    create_markdown_artifact(report.markdown(), key="serving-gate", description=f"MLflow run {evaluated.run_id}")
    outcome = "passed" if report.passed else "failed"
    tag_version(registered, {SERVING: outcome})
    if not report.passed:
        failed = "; ".join(f"{check.name}: {check.detail}" for check in report.checks if not check.passed)
        raise ServingRefused(f"{registered.uri} is not fit to be served, and has no alias: {failed}")
    set_alias(registered, CHALLENGER)
    run_logger().info(
        "%s serves what was evaluated (%d checks) and is now %s", registered.uri, len(report.checks), CHALLENGER
    )
    return report


def try_serving(
    model: ModelVersion,
    images: Tensor,
    expected: Tensor,
    tolerance: float,
    config: ServingConfig,
    consumer: Consumer,
    server: Server | None = None,
) -> ServingReport:
    """Makes all checks; the server starts while the fresh process is at work.

    Args:
        images: uint8 N×C×H×W.
        expected: probabilities float32 N×classes.
        tolerance: largest difference of a probability.
        consumer: one that is waiting.
        server: likewise; None starts one.
    """
    given_up = Event()
    with ThreadPoolExecutor(1) as beside:
        try:
            http = beside.submit(list, _over_http(model, images, expected, tolerance, config, given_up, server))
            checks = list(_in_fresh_process(model, images, expected, tolerance, config, consumer))
            if checks[0].passed:  # else it cannot be served either
                checks += http.result()
        finally:
            given_up.set()
    return ServingReport(model=model.uri, tolerance=tolerance, checks=tuple(checks))


def _in_fresh_process(
    model: ModelVersion,
    images: Tensor,
    expected: Tensor,
    tolerance: float,
    config: ServingConfig,
    consumer: Consumer,
) -> Iterator[ServingCheck]:
    try:
        consumed = consumer.predict(model.uri, images, batch_sizes(images), config.time_limit)
    except ConsumerFailed as error:
        yield ServingCheck(name="loads in a fresh process", passed=False, detail=str(error))
        return
    yield ServingCheck(name="loads in a fresh process", passed=True, detail="mlflow.pyfunc")
    for size, got in sorted(consumed.predictions.items()):
        yield _compared(f"pyfunc, batch of {size}", got, expected[:size], tolerance)
    for name, message in consumed.refusals.items():
        yield ServingCheck(name=f"pyfunc refuses {name}", passed=message is not None, detail=message or "it was taken")


def _over_http(
    model: ModelVersion,
    images: Tensor,
    expected: Tensor,
    tolerance: float,
    config: ServingConfig,
    given_up: Event,
    server: Server | None,
) -> Iterator[ServingCheck]:
    if not config.http:
        return
    try:
        with http_server(model.uri, config.time_limit, given_up, server) as client:
            yield ServingCheck(name="is served over HTTP", passed=True, detail="mlflow models serve")

            def ask(content: object) -> httpx.Response:
                if given_up.is_set():
                    raise ConsumerFailed(f"{model.uri} is not needed any more")
                return post_images(client, content)

            for size in batch_sizes(images):
                answer = ask(images[:size].tolist())
                yield _compared(f"HTTP, batch of {size}", _predictions(answer), expected[:size], tolerance)
            for name, content in _wrong_inputs(images[:2]).items():
                answer = ask(content)
                refused = answer.status_code == 400
                yield ServingCheck(name=f"HTTP refuses {name}", passed=refused, detail=_said(answer))
            answer = ask(images[:1].tolist())
            yield _compared("HTTP, after wrong inputs", _predictions(answer), expected[:1], tolerance)
    except (ConsumerFailed, httpx.HTTPError) as error:
        said = one_line(error) or type(error).__name__
        yield ServingCheck(name="answers over HTTP", passed=False, detail=said)


def _wrong_inputs(images: Tensor) -> dict[str, object]:
    """What must not be taken. Fractions are not among them: MLflow's server rounds them down to the signature's
    integers before the model sees them."""
    beyond = images.int()
    beyond[0, 0, 0, 0] = 256
    return {
        "another height": images[:, :, 1:].tolist(),
        "another number of channels": torch.cat([images, images[:, :1]], 1).tolist(),
        "no batch": images[0].tolist(),
        "a value beyond 255": beyond.tolist(),
        "text": "an image",
    }


def _compared(name: str, got: Tensor | str, expected: Tensor, tolerance: float) -> ServingCheck:
    if isinstance(got, str):
        return ServingCheck(name=name, passed=False, detail=got)
    difference = largest_difference(got, expected)
    detail = f"largest difference {difference:.2g}, allowed {tolerance:g}"
    if math.isinf(difference):
        detail = f"shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    return ServingCheck(name=name, passed=difference <= tolerance, detail=detail)  # False for NaN


def largest_difference(got: Tensor, expected: Tensor) -> float:
    """Of two batches of probabilities; infinite if their shapes differ, NaN if a value is."""
    return float((got - expected).abs().max()) if got.shape == expected.shape else math.inf


def _predictions(answer: httpx.Response) -> Tensor | str:
    """The probabilities, or what the server said instead."""
    if answer.status_code != 200:
        return _said(answer)
    try:
        return torch.tensor(answer.json()["predictions"], dtype=torch.float32)
    except (ValueError, KeyError, TypeError) as error:
        return f"not an answer with predictions: {error}"


def _said(answer: httpx.Response) -> str:
    """Status and message; MLflow repeats the whole input before it says what is wrong."""
    text = answer.text
    if answer.headers.get("content-type", "").startswith("application/json"):
        content = answer.json()
        text = str(content.get("message", text)) if isinstance(content, dict) else text
    text = one_line(text.rpartition("Error: ")[2])
    return f"HTTP {answer.status_code}: {text[:300]}"
