"""Exports a registered version to a file for use elsewhere."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, get_args

import torch
from torch import Tensor

from cnn.networks.wrappers import normalisation
from cnn.serving.export import Description, check_onnx, export_onnx, export_pt2, export_weights
from cnn.serving.usage import (
    NORMALISED_OUTSIDE,
    Usage,
    convoy9_example,
    example_with_convoy,
    onnx_example,
    pt2_example,
)
from infra.errors import UsageError
from infra.machine.files import check_writable, file_digest
from infra.records import Record
from infra.storage.object_store import ObjectStore, open_bucket
from infra.tracking.model_registry import RegisteredVersion
from infra.tracking.model_versions import download_version
from infra.tracking.promotion_history import find_model
from infra.tracking.served_model import ServedModel
from tasks.data.dataset import load_manifest
from tasks.evaluation.evaluate import fetch_weights
from tasks.evaluation.reference_images import load_reference
from tasks.prediction.inputs import target_of
from tasks.training.runs.run_record import read_record

Format = Literal["pt2", "onnx", "safetensors"]


class Exported(Record):
    """The exported file, and how it was checked."""

    model: str
    """`models:/name/version`."""

    out: Path
    format: Format
    bytes: int
    sha256: str
    largest_difference: float
    """Between the probabilities of the file and of the registered model."""

    images: int
    """Number of compared images."""

    temperature: float
    """In the file's metadata; it is not applied to the file's probabilities."""


def export(model: str, format: Format, out: Path) -> Exported:
    """Writes a registered version to a file, once the file's probabilities equal the version's.

    `pt2` and `onnx` take raw images and return probabilities; `safetensors` is for
    `cnn.serving.export.load_classifier`, or for the same network in other code. Each file carries the metadata of
    `cnn.serving.usage.Usage`.

    Args:
        model: `name` (its champion), `name@alias` or `name/version`.
        out: replaced if it exists.

    Raises:
        UsageError: no such version, no such format, or `out` cannot be written.
        InputError: packages that ONNX needs are missing.
        ExportDiffers: the file's probabilities would differ; nothing is written.
        ServiceError: MLflow or the object store failed.
    """
    if format not in get_args(Format):
        raise UsageError(f"--format {format}: choose one of {', '.join(get_args(Format))}")
    if out.suffix in {f".{each}" for each in get_args(Format)} - {f".{format}"}:
        raise UsageError(f"--out {out}: this is the name of another format than --format {format}")
    check_writable(out, "--out")
    if format == "onnx":
        check_onnx()
    store = open_bucket()
    version = find_model(store, model)
    images = load_reference(store, version.required("reference_key"))["images"]
    with TemporaryDirectory() as temporary:
        folder = download_version(version, Path(temporary))
        served = ServedModel(version, folder)
        expected = torch.from_numpy(served.predict(images.numpy()))
        usage = Usage(
            model=version.name,
            version=version.version,
            run=version.run_id,
            weights_sha256=version.required("weights_sha256"),
            classes=served.classes,
            target=target_of(served),
            temperature=version.temperature,
        )
        if format == "safetensors":
            worst = _export_weights(store, version, usage, out, images, expected)
        else:
            program = torch.export.load(folder / "data" / "model.pt2")
            if format == "pt2":
                worst = export_pt2(program, out, images, expected, usage.metadata(pt2_example))
            else:
                worst = export_onnx(program, out, images, expected, usage.metadata(onnx_example))
    return Exported(
        model=version.uri,
        out=out,
        format=format,
        bytes=out.stat().st_size,
        sha256=file_digest(out),
        largest_difference=worst,
        images=len(images),
        temperature=usage.temperature,
    )


def _export_weights(
    store: ObjectStore, version: RegisteredVersion, usage: Usage, out: Path, images: Tensor, expected: Tensor
) -> float:
    digest = usage.weights_sha256
    manifest = load_manifest(store, version.required("dataset_version"))
    config = read_record(version.run_id).config.training().model_copy(update={"pretrained": None})
    mean, std = normalisation(config, manifest)
    description = Description(
        config=config,
        classes=manifest.classes,
        channels=manifest.channels,
        image_size=manifest.image_size,
        resize=manifest.resize,
        mean=mean,
        std=std,
        weights_sha256=digest,
    )
    network, _ = description.classifier()
    fetch_weights(store, version.required("weights_key"), digest, network)
    example = convoy9_example if description.config.model == "convoy9" else example_with_convoy
    return export_weights(network, description, out, images, expected, usage.metadata(example, NORMALISED_OUTSIDE))
