"""The result of a training run: as JSON for scripts (`--summary FILE`) and as a page for people."""

import json
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from infra.errors import UsageError
from infra.records import Record
from tasks.reporting.markdown import Markup, plain, shown, table


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

    world_size: int | None = None
    train_seconds: float | None = None
    total_seconds: float | None = None
    images_per_second: float | None = None
    mlflow_tracking_uri: str | None = None
    mlflow_run_id: str | None = None
    mlflow_run_url: str | None = None
    prefect_flow_run_id: str | None = None
    prefect_flow_run_url: str | None = None
    checkpoint_prefix: str | None = None
    reused: tuple[str, ...] = ()
    """Steps whose output existed already."""

    step_seconds: dict[str, float] = Field(default_factory=dict)

    @property
    def headline(self) -> str:
        """The outcome as one line."""
        if self.status == "done":
            return f"{self.model_name}/{self.model_version} is " + ("champion" if self.champion else "registered")
        return (self.reason if self.status == "unchanged" else self.error) or self.status

    def as_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude_none=True)


def check_writable(path: Path, option: str = "--summary") -> None:
    """Raises UsageError before a long training if a file cannot be written there."""
    place = path if path.exists() and _is_irreplaceable(path) else Path(os.path.realpath(path)).parent
    if path.is_dir() or not os.access(place, os.W_OK):
        raise UsageError(f"{option} {path}: cannot write there; name a file in a folder that exists")


def _is_irreplaceable(path: Path) -> bool:
    """Returns whether a new file must not replace the path: a device, a pipe, or a link such as /dev/stdout."""
    return path.is_symlink() or (path.exists() and not path.is_file())


def write_summary(path: Path, summary: Summary) -> None:
    """Writes the summary as JSON, atomically: readers see the old file or the whole new one."""
    _write(path, json.dumps(summary.as_dict(), indent=2) + "\n")


def write_report(path: Path, summary: Summary, pages: Sequence[str]) -> None:
    """Writes a page about a run, in Markdown, for the summary of a CI job or a comment.

    Args:
        pages: the run's own pages, which are appended folded.
    """
    outcomes = {"done": "promoted" if summary.champion else "registered, not promoted", "unchanged": "nothing to do"}
    rows = {
        "model": f"{summary.model_name} version {summary.model_version}" if summary.model_version else None,
        "accuracy": f"{summary.accuracy:.2%} of the test split" if summary.accuracy is not None else None,
        "quality gate": summary.verdict,
        "reason": summary.reason,
        "error": summary.error,
        "cost": _cost(summary),
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
    if summary.train_seconds is None or summary.world_size is None:
        return f"{summary.total_seconds:.0f} s" if summary.total_seconds else None
    hours = summary.train_seconds * summary.world_size / 3600
    return (
        f"{summary.total_seconds:.0f} s in all, {summary.train_seconds:.0f} s of training on {summary.world_size} "
        f"ranks: {hours:.2f} rank-hours, {summary.images_per_second:,.0f} images/s"
    )


def _write(path: Path, text: str) -> None:
    if _is_irreplaceable(path):
        path.write_text(text)
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)
