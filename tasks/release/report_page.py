"""Makes a run's page `report/index.html`, one file with every table and picture, and its description in MLflow.

Both are made from the run's `report/`, which the other steps have filled, so they can be made again at any time.
"""

import base64
from collections.abc import Mapping
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory

from markdown_it import MarkdownIt
from prefect.artifacts import create_link_artifact, create_table_artifact
from rich.filesize import decimal

from infra.storage.object_store import open_bucket
from infra.storage.s3_client import ObjectMissing
from infra.tracking import mlflow_runs
from infra.tracking.model_registry import RegisteredVersion
from tasks.data.dataset import DatasetDamaged, load_manifest, open_cache, open_split
from tasks.evaluation.report import EvaluationReport
from tasks.orchestration.progress import run_logger
from tasks.orchestration.step import step
from tasks.release import report_summary
from tasks.release.quality.verdict import Verdict
from tasks.release.report_summary import first_screen, make_thumbnails
from tasks.reporting.markdown import plain

PARTS = (
    ("Verdict", "verdict.md", ()),
    ("Evaluation", "evaluation.md", ("confusion_matrix.png", "gallery.png", "reliability.png")),
    ("Serving", "serving.md", ()),
    ("Data", "data.md", ("data_samples.png",)),
)
"""In a reader's order: is it in use, how good is it, can it be served, what was it trained on; other pages follow."""

HARDEST_CLASSES = 3  # in the description

STYLE = """
body { max-width: 62rem; margin: 1rem auto; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif; color: #1b2a41 }
table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: .25rem .75rem; border-bottom: 1px solid #dde3ea }
th { text-align: left } h2 { margin-top: 3rem; border-bottom: 2px solid #2f6db5 } img { max-width: 100% }
code { background: #f1f4f8; padding: 0 .25rem }
@media print {
  body { max-width: none; margin: 0; padding: 0; font-size: 10pt } h1, h2 { break-after: avoid }
  figure, img, tr, section { break-inside: avoid } * { print-color-adjust: exact }
  img { max-height: 24cm } @page { margin: 1.5cm }
}
"""


@step("report-page")
def publish_page(version: RegisteredVersion) -> None:
    """Makes the page and the description of a version's run, and links to them in Prefect.

    Raises:
        ServiceError: MLflow failed.
    """
    report = make_page(version)
    create_table_artifact(result_table(version, report), key="result", description=version.address)
    link = mlflow_runs.run_url(version.run_id)
    create_link_artifact(link, link_text=f"MLflow run of {version.address}", key="mlflow-run")
    run_logger().info("the report is %s/artifacts/report/index.html", link)


def make_page(version: RegisteredVersion) -> EvaluationReport:
    """Makes the page and the description; returns the report that they show."""
    run_id = version.run_id
    with TemporaryDirectory() as temporary:
        folder = mlflow_runs.fetch_artifacts(run_id, "report", Path(temporary))
        report = EvaluationReport.model_validate_json((folder / "evaluation.json").read_bytes())
        mlflow_runs.log_text(run_id, "report/index.html", html_page(version.address, folder, _thumbnails(folder)))
    mlflow_runs.describe_run(run_id, description(version, report))
    return report


def _thumbnails(folder: Path) -> Mapping[int, str]:
    """Returns pictures of the images on which the version and the champion differ; none if their data are gone."""
    verdict = Verdict.from_file(folder / "verdict.json")
    if verdict is None or verdict.changes is None:
        return {}
    store = open_bucket()
    try:
        manifest = load_manifest(store, verdict.dataset_version)
        return make_thumbnails(verdict.changes, open_split(open_cache(store), manifest, "test"))
    except (ObjectMissing, DatasetDamaged) as error:
        run_logger().warning("the report does not show the changed images: %s", error)
        return {}


def html_page(title: str, folder: Path, thumbnails: Mapping[int, str]) -> str:
    """Returns the parts that exist in a folder as one page, which needs no other file and runs no script.

    Args:
        thumbnails: addresses of pictures of changed images, by position in the test split.
    """
    render = MarkdownIt("commonmark", {"html": False}).enable("table").render
    body = [f"<h1>{escape(title)}</h1>", first_screen(folder, thumbnails)]
    known = {page for _, page, _ in PARTS}
    others = sorted(page.name for page in folder.glob("*.md") if page.name not in known)
    for heading, page, pictures in (*PARTS, *((name.removesuffix(".md").capitalize(), name, ()) for name in others)):
        if not (folder / page).exists():
            continue
        body += [f"<h2>{heading}</h2>", render((folder / page).read_text())]
        for name in pictures:
            data = base64.b64encode((folder / name).read_bytes()).decode()
            body.append(f'<p><img alt="{Path(name).stem.replace("_", " ")}" src="data:image/png;base64,{data}"></p>')
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{report_summary.STYLE}{STYLE}</style>{chr(10).join(body)}</html>"
    )


def result_table(version: RegisteredVersion, report: EvaluationReport) -> list[dict[str, str]]:
    """Returns the rows of Prefect's table."""
    low, high = report.accuracy_interval
    rows = {
        "accuracy": f"{report.accuracy:.2%} ({low:.2%} to {high:.2%})",
        "cross-entropy": f"{report.loss:.4f}",
        "macro F1": f"{report.macro.f1:.4f}",
        "calibration error": f"{report.calibration.ece_after:.2%} at temperature {report.calibration.temperature:.3f}",
        "serving gate": version.record.serving or "not reached",
        "quality gate": version.record.verdict_summary or "not reached",
    }
    if report.footprint:
        rows["weights"] = decimal(report.footprint.size_bytes)
        rows |= {f"latency, batch of {n}": f"{ms:.2f} ms per image" for n, ms in report.footprint.latency_ms.items()}
    return [{"measure": name, "value": value} for name, value in rows.items()]


def description(version: RegisteredVersion, report: EvaluationReport) -> str:
    """Returns the description of the run as Markdown: what a reviewer needs first."""
    hardest = sorted((each for each in report.classes if each.support), key=lambda each: each.f1)[:HARDEST_CLASSES]
    lines = [
        f"{report.headline}, as [{plain(version.address)}]({version.url})",
        "",
        f"- quality gate: {plain(version.record.verdict_summary or 'not reached')}",
        f"- serving gate: {plain(version.record.serving or 'not reached')}",
        "- hardest classes, by F1: " + ", ".join(f"{plain(each.name)} {each.f1:.3f}" for each in hardest),
        f"- calibration error {report.calibration.ece_before:.2%}, {report.calibration.ece_after:.2%} with temperature",
        "- all tables and pictures: `report/index.html` under Artifacts",
    ]
    return "\n".join(lines)
