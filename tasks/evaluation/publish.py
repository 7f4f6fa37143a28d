"""Publishes an evaluation in MLflow and Prefect: numbers, pictures and a page."""

from collections.abc import Iterable, Sequence

from prefect.artifacts import create_markdown_artifact
from rich.filesize import decimal

from cnn.data.split_reader import SplitReader
from infra.tracking import mlflow_runs
from infra.tracking.tags import TEMPERATURE
from tasks.evaluation.figures import confusion_figure, gallery_picture, heat_map_picture, reliability_figure
from tasks.evaluation.heat_maps import HeatMap
from tasks.evaluation.report import EvaluationReport
from tasks.reporting.markdown import Markup, table

LISTED_CLASSES = 40  # of more classes, the table lists those with the lowest F1
LISTED_SLICES = 10  # per column, those with the lowest accuracy
LISTED_MISTAKES = 8


def publish_evaluation(run_id: str, report: EvaluationReport, split: SplitReader, maps: Sequence[HeatMap] = ()) -> None:
    """Publishes a report in an MLflow run (`report/`, metrics, tag `convoy.temperature`) and as a page in Prefect.

    Args:
        split: the split of the report.
        maps: of some of its images; none if the network has no useful map.

    Raises:
        ServiceError: MLflow cannot be reached, or refuses.
    """
    # MLflow sorts metrics by name: the accuracy comes first in charts and in comparisons of runs.
    mlflow_runs.log_metrics(run_id, {f"accuracy/{report.split}": report.accuracy, **report.metrics()})
    mlflow_runs.set_tags(run_id, {TEMPERATURE: str(report.calibration.temperature)})
    mlflow_runs.log_text(run_id, "report/evaluation.json", report.model_dump_json(indent=2))
    mlflow_runs.log_text(run_id, "report/evaluation.md", report_markdown(report))
    mlflow_runs.log_text(run_id, "report/confusion_matrix.json", report.confusion_json())
    mlflow_runs.log_figure(run_id, "report/confusion_matrix.png", confusion_figure(report))
    mlflow_runs.log_figure(run_id, "report/reliability.png", reliability_figure(report))
    mlflow_runs.log_image(run_id, "report/gallery.png", gallery_picture(report, split))
    if maps:
        mlflow_runs.log_image(run_id, "report/grad_cam.png", heat_map_picture(report, maps, split))
    description = f"Test split, {report.accuracy:.2%} correct, MLflow run {run_id}"
    create_markdown_artifact(report_markdown(report), key="evaluation", description=description)


def report_markdown(report: EvaluationReport) -> str:
    """Returns the report as a page: headline, classes by F1, most frequent mistakes, worst slices."""
    ordered = sorted(report.classes, key=lambda scores: scores.f1)
    listed = ordered[:LISTED_CLASSES]
    means = ((Markup("*macro mean*"), report.macro), (Markup("*weighted mean*"), report.weighted))
    scores = [*((s.name, s, s.support) for s in listed), *((name, s, report.images) for name, s in means)]
    rows = ((name, f"{s.precision:.3f}", f"{s.recall:.3f}", f"{s.f1:.3f}", images) for name, s, images in scores)
    lines = [
        f"{report.headline}, cross-entropy {report.loss:.4f}, macro F1 {report.macro.f1:.4f}",
        "",
        *_facts(report),
        "",
        *table(("class", "precision", "recall", "F1", "images"), rows, "lrrrr"),
    ]
    if len(listed) < len(ordered):
        lines += ["", f"These {len(listed)} of {len(ordered)} classes have the lowest F1."]
    if mistakes := report.mistakes(LISTED_MISTAKES):
        lines += ["", *table(("true", "predicted", "images"), mistakes, "llr")]
    if wrong := [each for each in report.confidently_wrong if each.path]:
        names = [scores.name for scores in report.classes]
        files = ((each.path, names[each.label], names[each.predicted], f"{each.probability:.0%}") for each in wrong)
        lines += ["", "Most confidently wrong:", "", *table(("file", "label", "model", "certain"), files, "lllr")]
    for name, slices in report.slices.items():
        if name != "class":
            worst = sorted(slices, key=lambda s: s.accuracy)[:LISTED_SLICES]
            found = ((s.value, f"{s.accuracy:.2%}", "{:.2%} … {:.2%}".format(*s.interval), s.images) for s in worst)
            lines += ["", *table((name, "accuracy", "95 % interval", "images"), found, "lrcr")]
            if len(worst) < len(slices):
                lines += ["", f"These {len(worst)} of {len(slices):,} values have the lowest accuracy."]
    return "\n".join(lines)


def _facts(report: EvaluationReport) -> Iterable[str]:
    if report.top_k:
        yield "- " + ", ".join(f"top-{k} {share:.2%}" for k, share in report.top_k.items())
    found = report.calibration
    yield (
        f"- calibration error (ECE): {found.ece_before:.2%} as trained, {found.ece_after:.2%} at temperature "
        f"{found.temperature:.3f} (cross-entropy {found.loss_after:.4f})" + f"; {found.remark}" * bool(found.remark)
    )
    if report.footprint:
        each = ", ".join(f"{ms:.2f} ms (batch {size})" for size, ms in report.footprint.latency_ms.items())
        place = f"{report.footprint.device}, {report.footprint.threads} threads"
        yield f"- {decimal(report.footprint.size_bytes)} of weights; per image {each} on {place}"
