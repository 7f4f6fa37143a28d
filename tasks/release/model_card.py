"""Writes the model card of a registered version, its description in MLflow.

The sections follow Mitchell et al., Model Cards for Model Reporting (2019), as far as they can be generated.
"""

import json
import shlex
from collections.abc import Iterable, Mapping

from cnn.config.training import TrainConfig
from cnn.data.manifest import Manifest
from cnn.formats.decode import Target
from cnn.serving.usage import ANSWER, preparation, prepare
from infra.records import Record
from infra.storage import bucket_layout
from infra.storage.object_store import open_bucket
from infra.tracking import mlflow_runs
from infra.tracking.client import tracking_uri
from infra.tracking.model_registry import ModelVersion, describe_version
from infra.tracking.model_versions import find_version
from infra.tracking.provenance import Provenance, provenance
from tasks.config.run import RunConfig
from tasks.data.dataset import DatasetRef, load_manifest
from tasks.evaluation.evaluate import Evaluation
from tasks.evaluation.report import EvaluationReport
from tasks.orchestration.flow_runs import page_of
from tasks.orchestration.step import step
from tasks.reporting.markdown import plain
from tasks.training.platform import flatten
from tasks.training.train import TrainResult

APPROVAL = "**Approval**:"  # begins a paragraph
LISTED_CLASSES = 30
ALWAYS_SHOWN = ("model", "epochs", "seed")  # configuration keys that are listed even at their defaults
MIN_CLASS_IMAGES = 100  # a class with fewer test images has uncertain scores


class CardLinks(Record):
    """Addresses of the runs, data, weights and code that a version was made with."""

    tracking_uri: str
    run_url: str
    flow_run_url: str | None
    dataset_uri: str
    weights_uri: str
    code: Provenance


@step("model-card")
def write_model_card(
    registered: ModelVersion, config: RunConfig, dataset: DatasetRef, trained: TrainResult, evaluated: Evaluation
) -> None:
    """Makes the card the version's description; replaces an earlier one.

    Raises:
        ServiceError: a server failed.
    """
    store = open_bucket()
    flow_run = find_version(registered.address).record.flow_run
    links = CardLinks(
        tracking_uri=tracking_uri(),
        run_url=mlflow_runs.run_url(trained.run_id),
        flow_run_url=page_of(flow_run) if flow_run else None,
        dataset_uri=store.uri(bucket_layout.dataset_manifest(dataset.version)),
        weights_uri=store.uri(trained.weights_key),
        code=provenance(),
    )
    manifest = load_manifest(store, dataset.version)
    describe_version(registered, model_card(registered, config, dataset, manifest, trained, evaluated.report, links))


def with_approval(card: str, sentence: str) -> str:
    """Returns a card with a person's decision before its first section, in place of an earlier one."""
    paragraphs = [each for each in card.split("\n\n") if not each.startswith(APPROVAL)]
    place = next((at for at, each in enumerate(paragraphs) if each.startswith("## ")), len(paragraphs))
    return "\n\n".join([*paragraphs[:place], f"{APPROVAL} {plain(sentence)}.", *paragraphs[place:]])


def model_card(
    model: ModelVersion,
    config: RunConfig,
    dataset: DatasetRef,
    manifest: Manifest,
    trained: TrainResult,
    report: EvaluationReport,
    links: CardLinks,
) -> str:
    """Returns the card as Markdown, most important things first, since MLflow keeps 5000 characters.

    Args:
        manifest: of the dataset version.
        report: on its test split.
    """
    channels, size = manifest.channels, manifest.image_size
    kind = "grey" if channels == 1 else "RGB"
    target, temperature = Target(size, channels, manifest.resize), report.calibration.temperature
    paragraphs = [
        f"{report.headline.replace('**', '')}; not judged.",  # `report_page` replaces this after the gates
        f"# {plain(model.name)}, version {model.version}",
        f"Cross-entropy {report.loss:.4f}, macro F1 {report.macro.f1:.4f}, validation accuracy "
        f"{trained.val_accuracy:.2%}.",
        "## Intended use",
        f"Classifies {kind} images of {size}×{size} pixels that were made like those of {plain(dataset.name)} into "
        f"{len(manifest.classes)} classes: {_names(manifest.classes)}.",
        "## How to load",
        f"```python\n{_example(model.uri, links.tracking_uri, target, temperature)}```",
        _bullets(_use(model, target, temperature)),
        "## Limits",
        _bullets(_limits(config, manifest, report)),
        "## Origin",
        _bullets(_origin(dataset, trained, links)),
        "## Data",
        _bullets(_data(config, manifest)),
        "## Configuration",
        "Keys that differ from their defaults; the MLflow run has every key.",
        _bullets(f"`{key}` {plain(str(value))}" for key, value in _configuration(config).items()),
    ]
    return "\n\n".join(paragraphs) + "\n"


def _use(model: ModelVersion, target: Target, temperature: float) -> list[str]:
    return [
        f"`images` are numpy uint8 [N, {target.channels}, {target.image_size}, {target.image_size}], not normalised. "
        f"From a photograph: {'; '.join(preparation(target))}.",
        "`probabilities` are not calibrated, neither here nor in exported files. "
        f"`p ** (1 / {temperature})`, divided by their sum, are; `convoy predict` gives these.",
        f"`convoy export {shlex.quote(model.address)} --format onnx --out FILE` (also `pt2`, `safetensors`) writes a "
        "file that carries classes, input, temperature, version and an example.",
    ]


def _limits(config: RunConfig, manifest: Manifest, report: EvaluationReport) -> list[str]:
    limits = [
        "The model always answers with one of its classes, even if the image shows something else.",
        "Its accuracy is unknown for images from other sources, cameras or times than those of the test split.",
    ]
    hardest = sorted((scores for scores in report.classes if scores.support), key=lambda scores: scores.recall)[:3]
    if hardest and hardest[0].recall < 1:
        limits.append(
            "Classes with the lowest recall: "
            + ", ".join(f"{plain(scores.name)} {scores.recall:.1%}" for scores in hardest)
            + "."
        )
    for true, predicted, count in report.mistakes(1):
        limits.append(f"Most frequent mistake: {plain(true)} classified as {plain(predicted)}, {count:,} times.")
    if few := sum(scores.support < MIN_CLASS_IMAGES for scores in report.classes):
        limits.append(f"Classes with fewer than {MIN_CLASS_IMAGES} test images, whose scores are uncertain: {few}.")
    if config.data.limit is not None:
        limits.append(f"This was a trial run on at most {config.data.limit:,} images per split.")
    if manifest.report.duplicates:
        limits.append(f"{manifest.report.duplicates:,} images of the source are duplicates of others.")
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
        "gates: tags `convoy.serving` and `convoy.verdict` of this version; `report/verdict.md` of the run",
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
    # Each network has its own options and defaults.
    default = flatten(TrainConfig.model_validate({"model": config.model}).model_dump(mode="json"))
    return {key: value for key, value in chosen.items() if key in ALWAYS_SHOWN or default.get(key) != value}


def _names(classes: tuple[str, ...]) -> str:
    shown = ", ".join(plain(name) for name in classes[:LISTED_CLASSES])
    return shown + (f" and {len(classes) - LISTED_CLASSES} more" if len(classes) > LISTED_CLASSES else "")


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _example(uri: str, server: str, target: Target, temperature: float) -> str:
    """Returns code that uses the version `uri` of the MLflow server at `server`, from a photograph to a class."""
    server, model = (json.dumps(address, ensure_ascii=False) for address in (server, uri))
    return f"""\
import mlflow
import numpy as np
from PIL import Image, ImageOps

mlflow.set_tracking_uri({server})
model = mlflow.pyfunc.load_model({model})
classes = model.metadata.metadata["classes"]
size, mode, temperature = {target.image_size}, "{target.mode}", {temperature}

{prepare(target.resize)}
probabilities = model.predict(images)
{ANSWER}"""
