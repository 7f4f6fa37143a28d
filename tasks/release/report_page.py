"""Makes a run's page `report/index.html`, one file with every table and picture, and its description in MLflow.

Both are made from the run's `report/`, which the other steps have filled, so they can be made again at any time.
"""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image
from prefect.artifacts import create_link_artifact, create_table_artifact
from rich.filesize import decimal

from infra.storage.object_store import open_bucket
from infra.storage.s3_client import ObjectMissing
from infra.tracking import mlflow_runs
from infra.tracking.model_registry import RegisteredVersion, describe_version, headed, tag_version
from infra.tracking.tags import DESCRIPTION, MODEL_VERSION, RESULT, VERDICT, VersionRecord
from tasks.data.dataset import DatasetDamaged, load_manifest, open_cache, open_split
from tasks.evaluation.report import EvaluationReport
from tasks.orchestration.progress import run_logger
from tasks.orchestration.step import step
from tasks.release import report_summary
from tasks.release.quality.verdict import Verdict
from tasks.release.report_summary import first_screen, make_thumbnails
from tasks.reporting.html import document, rendered, webp
from tasks.reporting.markdown import plain

PARTS = (
    ("Verdict", "verdict.md", ()),
    ("Evaluation", "evaluation.md", ("confusion_matrix.png", "gallery.png", "grad_cam.png", "reliability.png")),
    ("Serving", "serving.md", ()),
    ("Data", "data.md", ("data_samples.png", "augmented.png")),
)
"""In a reader's order: is it in use, how good is it, can it be served, what was it trained on; other pages follow."""

CAPTIONS = {
    "grad_cam.png": "Above, a test image; below, the parts of it that raised the score of the class that the model "
    "chose (Grad-CAM): yellow most, green less, dark violet not at all. Each image has a scale of its own, so compare "
    "places, not images. The colours show where the model found its evidence, not what it saw there or whether the "
    "reason is sound. Background, edges or a text in the picture are a reason to look at the data.",
    "augmented.png": "Above, training images of the first step; below, what the network got in their place after the "
    "random changes of augment.* (it saw others in every step). A class that you can no longer tell from the lower "
    "picture is one that the network could not learn from it.",
}
"""In plain words, below a picture: what one sees, and what it does not prove."""

HARDEST_CLASSES = 3  # in the description


@step("report-page")
def publish_page(version: RegisteredVersion) -> None:
    """Makes the page, describes version and run by their result, and links to them in Prefect.

    Raises:
        ServiceError: MLflow failed.
    """
    if report := make_page(version):
        create_table_artifact(result_table(version, report), key="result", description=version.address)
    link = mlflow_runs.run_url(version.run_id)
    create_link_artifact(link, link_text=f"MLflow run of {version.address}", key="mlflow-run")
    run_logger().info("the report is %s", mlflow_runs.report_url(version.run_id))


def make_page(version: RegisteredVersion) -> EvaluationReport | None:
    """Makes the page and the descriptions; returns the report that they show.

    Without a report, which a training that was killed may lack and another version of Convoy writes otherwise, returns
    None, and leaves the descriptions as they are.
    """
    run_id = version.run_id
    with TemporaryDirectory() as temporary:
        folder = mlflow_runs.fetch_artifacts(run_id, "report", Path(temporary))
        report = EvaluationReport.from_file(folder / "evaluation.json")
        page = html_page(version.address, folder, _thumbnails(folder), version.record)
        mlflow_runs.log_text(run_id, "report/index.html", page)
    record = version.record
    outcome = {RESULT: record.headline, MODEL_VERSION: version.address}
    outcome |= {VERDICT: record.outcome} if record.outcome else {}
    if report:
        outcome |= {DESCRIPTION: description(version, report)}
        describe_version(version, headed(version.description, f"{first_sentence(version, report)}."))
    mlflow_runs.set_tags(run_id, outcome)
    tag_version(version, {RESULT: record.headline})
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


def html_page(title: str, folder: Path, thumbnails: Mapping[int, str], record: VersionRecord | None = None) -> str:
    """Returns the parts that exist in a folder as one page, which needs no other file and runs no script.

    Args:
        thumbnails: addresses of pictures of changed images, by position in the test split.
        record: of the version, for a person's decision.
    """
    body = [f"<h1>{escape(title)}</h1>", first_screen(folder, thumbnails, record or VersionRecord())]
    known = {page for _, page, _ in PARTS}
    others = sorted(page.name for page in folder.glob("*.md") if page.name not in known)
    for heading, page, pictures in (*PARTS, *((name.removesuffix(".md").capitalize(), name, ()) for name in others)):
        if not (folder / page).exists():
            continue
        body += [f"<h2>{heading}</h2>", rendered((folder / page).read_text())]
        body += [_picture(folder / name) for name in pictures if (folder / name).exists()]
    return document(title, "\n".join(body), report_summary.STYLE)


def _picture(file: Path) -> str:
    """Returns a picture, and its caption if it has one, as HTML."""
    with Image.open(file) as picture:
        image = f'<img alt="{file.stem.replace("_", " ")}" src="{webp(picture)}">'
    caption = CAPTIONS.get(file.name)
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>" if caption else f"<p>{image}</p>"


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
    if approval := version.record.approval_sentence:
        rows["approval"] = approval
    if report.footprint:
        rows["weights"] = decimal(report.footprint.size_bytes)
        rows |= {f"latency, batch of {n}": f"{ms:.2f} ms per image" for n, ms in report.footprint.latency_ms.items()}
    return [{"measure": name, "value": value} for name, value in rows.items()]


def first_sentence(version: RegisteredVersion, report: EvaluationReport) -> str:
    """Returns accuracy and verdict, as Markdown without emphasis, since some of MLflow's tables show its source."""
    verdict = version.record.verdict_summary or version.record.outcome or "not judged"
    return f"{report.headline.replace('**', '')}; {plain(verdict)}"


def description(version: RegisteredVersion, report: EvaluationReport) -> str:
    """Returns the description of the run as Markdown: what a reviewer needs first."""
    hardest = sorted((each for each in report.classes if each.support), key=lambda each: each.f1)[:HARDEST_CLASSES]
    lines = [
        first_sentence(version, report),
        "",
        f"- registered as [{plain(version.address)}]({version.url})",
        f"- to compare: [all runs of this data set]({mlflow_runs.runs_url(version.run_id)})",
        f"- quality gate: {plain(version.record.verdict_summary or 'not reached')}",
        *([f"- approval: {plain(approval)}"] if (approval := version.record.approval_sentence) else []),
        f"- serving gate: {plain(version.record.serving or 'not reached')}",
        "- hardest classes, by F1: " + ", ".join(f"{plain(each.name)} {each.f1:.3f}" for each in hardest),
        f"- calibration error {report.calibration.ece_before:.2%}, {report.calibration.ece_after:.2%} with temperature",
        f"- all tables and pictures: [report]({mlflow_runs.report_url(version.run_id)})",
    ]
    return "\n".join(lines)
