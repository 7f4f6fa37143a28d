"""The serving gate: checks that the registered version gives outside users the probabilities of the evaluation."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import httpx
import torch
from prefect.artifacts import create_markdown_artifact
from torch import Tensor

from cnn.networks.own import CONVOYS, own_packages
from infra.errors import GateRefused, one_line
from infra.machine.threads import result_of
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
from tasks.release.serving.clients import ConsumerFailed, FreshProcesses, batch_sizes, post_images
from tasks.reporting.markdown import Markup, plain, table

CHALLENGER = "challenger"
TOLERANCE = {"cpu": 1e-5, "cuda": 1e-3}
"""Largest difference of a probability, by the device of the evaluation: round-off. That of GPUs is an estimate."""


class ServingCheck(Record):
    """One check of the served model."""

    name: str
    passed: bool
    detail: str
    """The numbers, or the model's own message."""

    tested: bool = True
    """False if it was switched off; `passed` is then true, and `detail` says why."""

    @property
    def outcome(self) -> str:
        """`passed`, `failed` or `not tested`."""
        return "failed" if not self.passed else "passed" if self.tested else "not tested"


class ServingReport(Record):
    """The checks of the gate."""

    model: str
    """`models:/name/version`."""

    tolerance: float
    checks: tuple[ServingCheck, ...]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    @property
    def count(self) -> str:
        """The number of checks, and what was not tested."""
        gaps = [f"not tested: {check.name} ({check.detail})" for check in self.checks if not check.tested]
        return "; ".join([f"{len(self.checks) - len(gaps)} checks", *gaps])

    def markdown(self) -> str:
        """Returns the report as a page."""
        rows = (
            (check.name, check.outcome if check.passed else Markup(f"**{check.outcome}**"), check.detail)
            for check in self.checks
        )
        head = f"Serving gate of {plain(self.model)}: **{'passed' if self.passed else 'refused'}**"
        return "\n".join([head, "", *table(("check", "result", "found"), rows, "lll"), ""])


class ServingRefused(GateRefused):
    """The registered version does not serve what was evaluated."""


@step("serving-gate")
def serving_gate(
    registered: ModelVersion,
    evaluated: Evaluation,
    config: ServingConfig,
    fresh: FreshProcesses,
    network: str = "",
) -> ServingReport:
    """Uses the version as a consumer would, then moves the alias `challenger` to it.

    The gate sends batches of 1, 3 and 64 raw images through `mlflow.pyfunc` in a fresh process and over HTTP. It also
    sends inputs of wrong shapes and types, which the model must refuse. The report goes to the MLflow run
    (`report/serving.json`), to Prefect, and as tag `convoy.serving` to the version. A version that fails is kept for
    inspection, without an alias.

    Args:
        fresh: starts the processes that use the version.
        network: its name. Of one's own, those processes cannot import the files, just as they cannot import Convoy.

    Raises:
        Cancelled: the flow run was cancelled.
        ServingRefused: a check failed; the report is published.
        ServiceError: a server failed.
    """
    stop_if_cancelled()
    reference = load_reference(open_bucket(), evaluated.reference_key)
    tolerance = config.tolerance or TOLERANCE[evaluated.device]
    report = try_serving(
        registered,
        reference["images"],
        reference["probabilities"],
        tolerance,
        config,
        fresh,
        (*CONVOYS, *own_packages(network)),
    )
    mlflow_runs.log_text(evaluated.run_id, "report/serving.json", report.model_dump_json(indent=2))
    mlflow_runs.log_text(evaluated.run_id, "report/serving.md", report.markdown())
    create_markdown_artifact(
        report.markdown(),
        key="serving-gate",
        description=f"Serving gate of {registered.address}, MLflow run {evaluated.run_id}",
    )
    outcome = "passed" if report.passed else "failed"
    tag_version(registered, {SERVING: outcome})
    if not report.passed:
        failed = "; ".join(f"{check.name}: {check.detail}" for check in report.checks if not check.passed)
        raise ServingRefused(f"the serving gate refused {registered.uri}, which gets no alias: {failed}")
    set_alias(registered, CHALLENGER)
    run_logger().info("%s serves what was evaluated (%s) and is now %s", registered.uri, report.count, CHALLENGER)
    return report


def try_serving(
    model: ModelVersion,
    images: Tensor,
    expected: Tensor,
    tolerance: float,
    config: ServingConfig,
    fresh: FreshProcesses,
    hidden: Sequence[str] = CONVOYS,
) -> ServingReport:
    """Runs all checks, side by side in a process that predicts and one that serves the model; then ends both.

    Args:
        images: uint8 N×C×H×W.
        expected: probabilities float32 N×classes.
        tolerance: largest difference of a probability.
        fresh: starts these processes.
        hidden: packages that they cannot import.
    """
    fresh.load()
    not_needed = Event()
    with ThreadPoolExecutor(1) as executor:
        try:
            http = executor.submit(
                list, _over_http(model, images, expected, tolerance, config, fresh, hidden, not_needed)
            )
            checks = list(_in_fresh_process(model, images, expected, tolerance, config, fresh, hidden))
            if checks[0].passed:  # a model that does not load cannot be served either
                served = result_of(http)
                checks += served
        finally:
            not_needed.set()
            fresh.dismiss()
    return ServingReport(model=model.uri, tolerance=tolerance, checks=tuple(checks))


def _in_fresh_process(
    model: ModelVersion,
    images: Tensor,
    expected: Tensor,
    tolerance: float,
    config: ServingConfig,
    fresh: FreshProcesses,
    hidden: Sequence[str],
) -> Iterator[ServingCheck]:
    try:
        consumed = fresh.predict(model.uri, images, batch_sizes(images), config.time_limit, hidden)
    except ConsumerFailed as error:
        yield ServingCheck(name="loads in a fresh process", passed=False, detail=str(error))
        return
    without = f"mlflow.pyfunc, where none of {', '.join(hidden)} can be imported"
    yield ServingCheck(name="loads in a fresh process", passed=True, detail=without)
    for size, got in sorted(consumed.predictions.items()):
        yield _compared(f"pyfunc, batch of {size}", got, expected[:size], tolerance)
    for name, message in consumed.refusals.items():
        yield ServingCheck(name=f"pyfunc refuses {name}", passed=message is not None, detail=message or "not refused")


def _over_http(
    model: ModelVersion,
    images: Tensor,
    expected: Tensor,
    tolerance: float,
    config: ServingConfig,
    fresh: FreshProcesses,
    hidden: Sequence[str],
    not_needed: Event,
) -> Iterator[ServingCheck]:
    if not config.http:
        detail = "serving.http=false switches it off"
        yield ServingCheck(name="is served over HTTP", passed=True, tested=False, detail=detail)
        return
    try:
        with fresh.serve(model.uri, config.time_limit, hidden, not_needed) as client:
            yield ServingCheck(name="is served over HTTP", passed=True, detail="the server of mlflow models serve")

            def post(content: object) -> httpx.Response:
                if not_needed.is_set():
                    raise ConsumerFailed(f"{model.uri} is not needed any more")
                return post_images(client, content)

            for size in batch_sizes(images):
                predictions = _predictions(post(images[:size].tolist()))
                yield _compared(f"HTTP, batch of {size}", predictions, expected[:size], tolerance)
            for name, content in _wrong_inputs(images[:2]).items():
                response = post(content)
                refused = response.status_code == 400
                yield ServingCheck(name=f"HTTP refuses {name}", passed=refused, detail=_describe(response))
            predictions = _predictions(post(images[:1].tolist()))
            yield _compared("HTTP, after wrong inputs", predictions, expected[:1], tolerance)
    except (ConsumerFailed, httpx.HTTPError) as error:
        yield ServingCheck(name="answers over HTTP", passed=False, detail=one_line(error) or type(error).__name__)


def _wrong_inputs(images: Tensor) -> dict[str, object]:
    """Returns inputs that the server must refuse. Fractions are not among them: before the model sees them, MLflow's
    server rounds them down to the signature's integers."""
    too_large = images.int()
    too_large[0, 0, 0, 0] = 256
    return {
        "another height": images[:, :, 1:].tolist(),
        "another number of channels": torch.cat([images, images[:, :1]], 1).tolist(),
        "no batch": images[0].tolist(),
        "a value beyond 255": too_large.tolist(),
        "text": "an image",
    }


def _compared(name: str, got: Tensor | str, expected: Tensor, tolerance: float) -> ServingCheck:
    if isinstance(got, str):
        return ServingCheck(name=name, passed=False, detail=got)
    if got.shape != expected.shape:
        detail = f"shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
        return ServingCheck(name=name, passed=False, detail=detail)
    difference = float((got - expected).abs().max())  # NaN fails the check too
    detail = f"largest difference {difference:.2g}, allowed {tolerance:g}"
    return ServingCheck(name=name, passed=difference <= tolerance, detail=detail)


def _predictions(response: httpx.Response) -> Tensor | str:
    """Returns the probabilities, or the server's message if there are none."""
    if response.status_code != 200:
        return _describe(response)
    try:
        return torch.tensor(response.json()["predictions"], dtype=torch.float32)
    except (ValueError, KeyError, TypeError) as error:
        return f"not a response with predictions: {error}"


def _describe(response: httpx.Response) -> str:
    """Returns status and message, without the whole input, which MLflow repeats before the message."""
    text = response.text
    if response.headers.get("content-type", "").startswith("application/json"):
        content = response.json()
        text = str(content.get("message", text)) if isinstance(content, dict) else text
    text = one_line(text.rpartition("Error: ")[2])
    return f"HTTP {response.status_code}: {text[:300]}"
