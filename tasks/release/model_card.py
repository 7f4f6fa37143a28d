"""The model card: what a registered version is, on what data, how good, for what use, as its description in MLflow.

The sections are those of Mitchell et al., Model Cards for Model Reporting (2019), as far as they can be generated.
"""

import json
from collections.abc import Iterable, Mapping

import numpy as np
from prefect.utilities.urls import url_for

from cnn.config.training import TrainConfig
from cnn.data.manifest import Manifest
from infra.records import Record
from infra.storage import bucket_layout
from infra.storage.object_store import open_bucket
from infra.tracking import mlflow_runs
from infra.tracking.model_registry import ModelVersion, describe_version
from infra.tracking.model_versions import find_version
from infra.tracking.provenance import Provenance, provenance
from tasks.config.run import RunConfig
from tasks.data.dataset import DatasetRef, load_manifest
from tasks.evaluation.binomial import wilson_interval
from tasks.evaluation.evaluate import Evaluation
from tasks.evaluation.report import EvaluationReport
from tasks.orchestration.step import step
from tasks.reporting.markdown import plain
from tasks.training.runs.run_record import flatten
from tasks.training.train import TrainResult

LISTED_CLASSES = 30
ALWAYS_SHOWN = ("model", "epochs", "seed")  # configuration keys, whether they have their default or not
FEW = 100  # images of a class, below which its scores mean little


class CardLinks(Record):
    """Where a version came from: addresses of the things it was made of and by."""

    run_url: str
    flow_run_url: str | None
    dataset_uri: str
    weights_uri: str
    code: Provenance


@step("model-card")
def write_model_card(
    registered: ModelVersion, config: RunConfig, dataset: DatasetRef, trained: TrainResult, evaluated: Evaluation
) -> None:
    """Generate the card and make it the version's description. Doing it again replaces it.

    Raises:
        ServiceError: a server failed.
    """
    store = open_bucket()
    flow_run = find_version(registered.address).record.flow_run
    links = CardLinks(
        run_url=mlflow_runs.run_url(trained.run_id),
        flow_run_url=url_for("flow-run", obj_id=flow_run) if flow_run else None,
        dataset_uri=store.uri(bucket_layout.dataset_manifest(dataset.version)),
        weights_uri=store.uri(trained.weights_key),
        code=provenance(),
    )
    manifest = load_manifest(store, dataset.version)
    describe_version(registered, model_card(registered, config, dataset, manifest, trained, evaluated.report, links))


def model_card(
    model: ModelVersion,
    config: RunConfig,
    dataset: DatasetRef,
    manifest: Manifest,
    trained: TrainResult,
    report: EvaluationReport,
    links: CardLinks,
) -> str:
    """The card as Markdown, with what matters most first, since MLflow keeps 5000 characters.

    Args:
        manifest: of the dataset version.
        report: on its test split.
    """
    channels, size = manifest.channels, manifest.image_size
    kind = "grey" if channels == 1 else "RGB"
    right = round(report.accuracy * report.images)
    low, high = wilson_interval(right, report.images, 0.95)
    return "\n".join(
        [
            f"# {plain(model.name)}, version {model.version}",
            "",
            f"**{report.accuracy:.2%}** of {report.images:,} test images right "
            f"(95 % interval {low:.2%} to {high:.2%}), cross-entropy {report.loss:.4f}, "
            f"macro F1 {report.macro.f1:.4f}; validation accuracy {trained.val_accuracy:.2%}.",
            "",
            "## Intended use",
            "",
            f"Tells which of {len(manifest.classes)} classes a {kind} image of {size}×{size} pixels shows, for images "
            f"that come about like those of {plain(dataset.name)}: {_names(manifest.classes)}.",
            "",
            "## How to load",
            "",
            "```python",
            "import mlflow",
            f"model = mlflow.pyfunc.load_model({json.dumps(model.uri, ensure_ascii=False)})",
            f"probabilities = model.predict(images)  # numpy uint8 [N, {channels}, {size}, {size}], not normalised",
            'classes = model.metadata.metadata["classes"]',
            "```",
            "",
            "## Limits",
            "",
            *_bullets(_limits(config, manifest, report)),
            "",
            "## Origin",
            "",
            *_bullets(_origin(dataset, trained, links)),
            "- gates: tags `convoy.serving` and `convoy.verdict` of this version; `report/verdict.md` of the run",
            "",
            "## Data",
            "",
            *_bullets(_data(config, manifest)),
            "",
            "## Configuration",
            "",
            "What differs from the defaults; the run has every key.",
            "",
            *_bullets(f"`{key}` {plain(str(value))}" for key, value in _configuration(config).items()),
            "",
        ]
    )


def _limits(config: RunConfig, manifest: Manifest, report: EvaluationReport) -> list[str]:
    limits = [
        "It answers with one of its classes whatever the image shows; nothing else is recognised as foreign.",
        "Nothing is known of images from other sources, cameras or times than the test split's.",
    ]
    hardest = sorted((scores for scores in report.classes if scores.support), key=lambda scores: scores.recall)[:3]
    if hardest and hardest[0].recall < 1:
        limits.append(
            "Hardest classes, by share of their images found: "
            + ", ".join(f"{plain(scores.name)} {scores.recall:.1%}" for scores in hardest)
            + "."
        )
    counts = np.array(report.confusion)
    np.fill_diagonal(counts, 0)
    true, predicted = np.unravel_index(counts.argmax(), counts.shape)
    if most := int(counts[true, predicted]):
        names = [plain(scores.name) for scores in report.classes]
        limits.append(f"Commonest mistake: {names[true]} taken for {names[predicted]}, {most:,} times.")
    if few := [scores.name for scores in report.classes if scores.support < FEW]:
        limits.append(f"{len(few)} classes have fewer than {FEW} test images, so their scores are uncertain.")
    if config.data.limit is not None:
        limits.append(f"A trial run, on at most {config.data.limit:,} images of each split.")
    if manifest.report.duplicates:
        limits.append(f"{manifest.report.duplicates:,} images of the source repeat others.")
    return limits


def _origin(dataset: DatasetRef, trained: TrainResult, links: CardLinks) -> list[str]:
    code = links.code
    commit = f"git commit `{code.git_commit}`" if code.git_commit else "git commit unknown"
    return [
        f"MLflow run [{trained.run_id}]({links.run_url})",
        *([f"Prefect [flow run]({links.flow_run_url})"] if links.flow_run_url else []),
        f"dataset version `{dataset.version}` (`{links.dataset_uri}`)",
        commit + (", with uncommitted changes" if code.git_dirty else ""),
        f"weights `{links.weights_uri}`, SHA-256 of their tensors `{trained.weights_sha256}`",
        ", ".join(f"{library} {found}" for library, found in code.versions.items()),
    ]


def _data(config: RunConfig, manifest: Manifest) -> list[str]:
    found = manifest.report
    return [
        f"source {plain(config.dataset)}",
        ", ".join(f"{info.count:,} {split} images" for split, info in manifest.splits.items()),
        f"{found.unreadable:,} of {found.images:,} source images unreadable, {found.duplicates:,} duplicates",
        *map(plain, found.warnings),
    ]


def _configuration(config: RunConfig) -> Mapping[str, object]:
    chosen = flatten(config.training().model_dump(mode="json"))
    # The network's options have other defaults for each network.
    default = flatten(TrainConfig.model_validate({"model": config.model}).model_dump(mode="json"))
    return {key: value for key, value in chosen.items() if key in ALWAYS_SHOWN or default.get(key) != value}


def _names(classes: tuple[str, ...]) -> str:
    shown = ", ".join(plain(name) for name in classes[:LISTED_CLASSES])
    return shown + (f" and {len(classes) - LISTED_CLASSES} more" if len(classes) > LISTED_CLASSES else "")


def _bullets(lines: Iterable[str]) -> list[str]:
    return [f"- {line}" for line in lines]
