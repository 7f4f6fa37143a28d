"""The result of a training run: as JSON for scripts (`--summary FILE`) and as a page for people."""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from infra.errors import GateRefused
from infra.machine.files import atomic_file, is_irreplaceable
from infra.records import Record
from tasks.reporting.markdown import Markup, accuracy_and_gain, plain, shown, table
from tasks.training.utilisation import Utilisation

REFUSED = "Refused"
"""Name of the state of a flow run that a gate has refused; notifications and scripts depend on it."""


GOES_ON = "a worker of its kind goes on with it"
"""End of the error of a flow run that has died."""


class Summary(Record):
    """The result of a training run. Scripts and CI depend on these names; values that do not exist are left out."""

    status: Literal["done", "unchanged", "refused", "failed", "interrupted"]
    """`unchanged`: there was no reason to retrain; `refused`: a gate refused the data or the model."""

    reason: str | None = None
    """Why `convoy retrain` did or did not train."""

    error: str | None = None
    exit_status: int = 0

    accuracy: float | None = None
    """Fraction of the test split that the registered weights classify correctly."""

    gain: float | None = None
    """The accuracy minus the champion's, on the test images that the quality gate compared; left out without one."""

    weights_sha256: str | None = None
    """Digest of the tensors in sorted name order."""

    dataset: str | None = None
    dataset_version: str | None = None
    model_name: str | None = None
    model_version: str | None = None
    champion: bool | None = None
    """Whether the version is now the champion; left out if no gate was reached."""

    verdict: str | None = None
    """The quality gate's verdict as one line."""

    approval: str | None = None
    """A person's decision, name and reason as one line; left out if nobody was asked."""

    world_size: int | None = None
    train_seconds: float | None = None
    rank_hours: float | None = None
    """Of all ranks, in each start up to its last checkpoint; left out for a training of an earlier release."""

    total_seconds: float | None = None
    images_per_second: float | None = None
    utilisation: Utilisation | None = None
    """What the ranks did with their time in training; left out for a training of an earlier release."""

    mlflow_tracking_uri: str | None = None
    mlflow_run_id: str | None = None
    mlflow_run_url: str | None = None
    mlflow_runs_url: str | None = None
    """The list of all runs of this data set."""

    commit: str | None = None
    """The commit whose code was asked for."""

    trial: bool | None = None
    """True for a trial of a commit: nothing is registered, and gain and verdict are as if it were."""

    sweep: dict[str, Any] | None = None
    """What a sweep has found; see `tasks.training.sweep.SweepResult`."""

    prefect_flow_run_id: str | None = None
    prefect_flow_run_url: str | None = None
    checkpoint_prefix: str | None = None
    reused: tuple[str, ...] = ()
    """Steps whose output existed already."""

    step_seconds: dict[str, float] = Field(default_factory=dict)

    @property
    def headline(self) -> str:
        """The outcome as one line."""
        if self.status == "done" and self.trial:
            return f"trial of {self.model_name}: {self.verdict or self.result}"
        if self.status == "done":
            return f"{self.model_name}/{self.model_version} is " + ("champion" if self.champion else "registered")
        return (self.reason if self.status == "unchanged" else self.error) or self.status

    @property
    def result(self) -> str:
        """The accuracy, and by how much it differs from the champion's; empty if nothing was evaluated."""
        return "" if self.accuracy is None else accuracy_and_gain(self.accuracy, self.gain)

    @property
    def news(self) -> Literal["promoted", "registered", "refused"] | None:
        """What a chat is told; None if nothing came of the run, and for a trial, which has its own readers."""
        if self.trial:
            return None
        if self.status == "done":
            return "promoted" if self.champion else "registered"
        return "refused" if self.status == "refused" else None

    @property
    def report_url(self) -> str | None:
        """The address of the report: a page of the MLflow run, with the options of its address."""
        run, mark, options = (self.mlflow_run_url or "").partition("?")
        return f"{run}/artifacts/report/index.html{mark}{options}" if run else None

    @property
    def message(self) -> str:
        """The text for a chat: what happened, the result, the reasons, and where to read more."""
        version = f"{self.model_name}/{self.model_version}" if self.model_version else str(self.model_name)
        did = {"promoted": "promoted to champion", "registered": "registered, not promoted"}.get(self.news or "")
        verdict = f"the quality gate {self.verdict}" if self.verdict else None
        lines = (
            f"{version} was {did or self.status}{f': {self.result}' if self.result else ''}",
            self.reason and f"why it ran: {self.reason}",
            self.error or verdict,
            self.report_url and f"report: {self.report_url}",
            self.prefect_flow_run_url and f"flow run: {self.prefect_flow_run_url}",
        )
        return "\n".join(line for line in lines if line)

    def as_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude_none=True)


class Refused(GateRefused):
    """A gate refused the data or the model. Flows raise it at their end, after all that it says is stored."""

    def __init__(self, summary: Summary) -> None:
        super().__init__(summary.error)
        self.summary = summary


def write_summary(path: Path, summary: Summary) -> None:
    """Writes the summary as JSON, atomically: readers see the old file or the whole new one."""
    _write(path, json.dumps(summary.as_dict(), indent=2) + "\n")


def write_report(path: Path, summary: Summary, pages: Sequence[str]) -> None:
    """Writes a page about a run, in Markdown, for the summary of a CI job or a comment.

    Args:
        pages: the run's own pages, which are appended folded.
    """
    outcomes = {"done": "promoted" if summary.champion else "registered, not promoted", "unchanged": "nothing to do"}
    if summary.trial:
        outcomes |= {"done": "a trial that the quality gate would pass", "refused": "a trial that it would refuse"}
    rows = {
        "model": f"{summary.model_name} version {summary.model_version}" if summary.model_version else None,
        "accuracy": f"{summary.accuracy:.2%} of the test split" if summary.accuracy is not None else None,
        "quality gate": summary.verdict,
        "approval": summary.approval,
        "reason": summary.reason,
        "commit": summary.commit,
        "error": summary.error,
        "cost": _cost(summary),
        "devices": summary.utilisation.line if summary.utilisation else None,
        "reused": ", ".join(summary.reused) or None,
        "MLflow": Markup(f"[run, charts and report]({summary.mlflow_run_url})") if summary.mlflow_run_url else None,
        "Prefect": Markup(f"[flow run]({summary.prefect_flow_run_url})") if summary.prefect_flow_run_url else None,
    }
    outcome = outcomes.get(summary.status, summary.status)
    lines = [f"### {plain(summary.model_name or 'Retraining')}: **{outcome}**", ""]
    lines += table(("", ""), ((name, value) for name, value in rows.items() if value), "ll")
    for page in pages:
        title = escape(shown(page.partition("\n")[0]))
        lines += ["", f"<details><summary>{title}</summary>", "", page.strip(), "", "</details>"]
    _write(path, "\n".join(lines) + "\n")


def _cost(summary: Summary) -> str | None:
    if None in (summary.train_seconds, summary.world_size, summary.rank_hours):
        return f"{summary.total_seconds:.0f} s" if summary.total_seconds else None
    return (
        f"{summary.total_seconds:.0f} s in all, {summary.train_seconds:.0f} s of training on {summary.world_size} "
        f"ranks: {summary.rank_hours:.2f} rank-hours, {summary.images_per_second:,.0f} images/s"
    )


def _write(path: Path, text: str) -> None:
    if is_irreplaceable(path):
        path.write_text(text)
        return
    with atomic_file(path, public=True) as temporary:
        temporary.write_text(text)
