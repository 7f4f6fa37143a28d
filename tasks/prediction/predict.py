"""The predict task: writes a table with a registered model's classes and probabilities for any number of images."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from prefect.artifacts import create_markdown_artifact
from scipy.special import softmax

from cnn.formats.decode import check_size, decode_image, read_header, reason_of
from cnn.threads import in_order
from infra.errors import Outage, ServiceError, UsageError, counted
from infra.records import Record
from infra.storage.object_store import open_bucket
from infra.storage.s3_client import ObjectMissing
from infra.tracking.model_registry import RegisteredVersion
from infra.tracking.promotion_history import find_model
from infra.tracking.served_model import ServedModel
from tasks.data.dataset import load_manifest
from tasks.orchestration.flow_runs import flow_run_id
from tasks.orchestration.progress import progress, run_logger
from tasks.orchestration.step import step
from tasks.prediction.inputs import Picture, pictures, target_of
from tasks.prediction.table import PredictedBatch, Unread, check_out, result_file, table_writer
from tasks.reporting.markdown import plain, table

BATCH_IMAGES, BATCH_BYTES = 64, 8 << 20  # of decoded images; the smaller limit applies
LISTED_UNREADABLE = 20
GREY_SPREAD = 8  # levels by which a grey photograph's colour channels may differ after JPEG
GREY_MODES = frozenset({"1", "L", "LA", "La", "I;16", "I;16L", "I;16B", "I"})


class Predictions(Record):
    """Summary of a table of predictions."""

    model: str
    """`models:/name/version`."""

    out: str
    images: int
    """Files in the table, including unreadable ones."""

    unreadable: int
    unreadable_examples: tuple[Unread, ...]
    classes: dict[str, int]
    """Images per predicted class, the most frequent class first."""

    temperature: float

    def markdown(self) -> str:
        """Returns the summary as a page."""
        files = f"{counted(self.images, 'file')}, {self.unreadable:,} unreadable"
        head = f"{files}, by {plain(self.model)} → {plain(self.out)}"
        lines = [head, "", *table(("class", "images"), self.classes.items(), "lr")]
        if self.unreadable:
            examples = ((each.file, each.reason) for each in self.unreadable_examples)
            lines += ["", *table(("unreadable", "reason"), examples, "ll")]
        return "\n".join([*lines, ""])


@step("predict", retried=False)
def predict(model: str, inputs: Sequence[str], out: str) -> Predictions:
    """Predicts the class of every image, and writes a table with one row per file in the inputs' order.

    Columns: `file`; `class` and its `probability`; `p_CLASS` per class; `error`, the reason why a file could not be
    used (the other columns are then empty). Images are decoded and made square as in preprocessing. The
    temperature in the version's tag `convoy.temperature` calibrates the probabilities, if the tag exists. Only a few
    batches are in memory, however many files there are.

    Args:
        model: `name` (its champion), `name@alias` or `name/version`.
        inputs: files, folders (links to folders are not followed), `s3://bucket/prefix` addresses.
        out: local path or `s3://` address of the table; `.parquet`, `.csv`, or `.json` and `.jsonl` (both JSON lines).
            The table appears whole or not at all.

    Raises:
        UsageError: no such model or input, no image among the inputs, or no readable image.
        ServiceError: MLflow or the object store failed.
    """
    check_out(out)
    total = sum(1 for _ in pictures(inputs))
    classifier = ImageClassifier(find_model(open_bucket(), model))
    unread: list[Unread] = []
    done, unread_count, classes = 0, 0, Counter[str]()
    with (
        result_file(out) as file,
        table_writer(file, classifier.classes) as write,
        progress(f"Predicting with {classifier.version.name}", total, unit="images", artifact="predict") as advance,
    ):
        for batch, probabilities in _predict_batches(classifier, pictures(inputs)):
            write(batch, probabilities)
            classes.update(classifier.classes[label] for label in probabilities.argmax(1))
            unread_count += len(batch.unread)
            unread += batch.unread[: LISTED_UNREADABLE - len(unread)]
            done += len(batch.names)
            advance(len(batch.names))
        if unread_count == done:
            raise UsageError(f"no usable file among {done}: {unread[0].file}: {unread[0].reason}")
    result = Predictions(
        model=classifier.version.uri,
        out=out,
        images=done,
        unreadable=unread_count,
        unreadable_examples=tuple(unread),
        classes=dict(classes.most_common()),
        temperature=classifier.temperature,
    )
    if flow_run_id():
        create_markdown_artifact(result.markdown(), key="predictions", description=f"Predictions by {result.model}")
    run_logger().info(
        "%s predicted, %s unreadable; %s", counted(done - unread_count, "image"), f"{unread_count:,}", out
    )
    return result


class ImageClassifier(ServedModel):
    """A loaded version, with the preparation of its images and the calibration of its probabilities.

    Raises:
        UsageError: Convoy did not register the version, or it cannot be loaded here.
        ServiceError: MLflow failed.
    """

    def __init__(self, version: RegisteredVersion) -> None:
        super().__init__(version)
        self.target = target_of(self)
        # Colour images are allowed if the network takes colour, or was trained on colour images converted to grey.
        self.colour = self.target.channels == 3 or _trained_on_colour(str(self.metadata.get("dataset_version")))
        self.temperature = version.temperature

    def probabilities(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Returns calibrated probabilities N×classes of raw images N×C×H×W."""
        return calibrated(self.predict(images), self.temperature)


def _trained_on_colour(dataset_version: str) -> bool:
    """Checks whether the training data had colour images, which preprocessing then converted to grey."""
    try:
        manifest = load_manifest(open_bucket(), dataset_version)
    except Outage:
        raise
    except ServiceError:  # deleted while the model is still in use, or not to be read from here: refuse no image
        return True
    return not set(manifest.report.modes) <= GREY_MODES | {"P"}


def calibrated(probabilities: NDArray[np.float32], temperature: float) -> NDArray[np.float32]:
    """Returns softmax(logits / temperature), computed from softmax(logits) (Guo et al. 2017)."""
    if temperature == 1.0:
        return probabilities
    with np.errstate(divide="ignore"):  # a probability of zero stays zero
        scaled = np.log(probabilities.astype(np.float64)) / temperature
    return np.asarray(softmax(scaled, axis=1), dtype=np.float32)


def _predict_batches(
    classifier: ImageClassifier, files: Iterator[Picture]
) -> Iterator[tuple[PredictedBatch, NDArray[np.float32]]]:
    """Yields batches in the files' order, each with probabilities of its readable images.

    Threads read, decode and predict a batch each, PyTorch with one thread in each of them. So none waits for another in
    the middle of a layer, and the probabilities do not depend on the number of cores.
    """
    import torch  # it takes seconds, which refusals above need not wait for

    size = max(1, min(BATCH_IMAGES, BATCH_BYTES // int(np.prod(classifier.target.shape))))
    groups = iter(lambda: list(islice(files, size)), [])
    none = np.empty((0, len(classifier.classes)), dtype=np.float32)  # this also loads the model, before the threads

    def predicted(group: Sequence[Picture]) -> tuple[PredictedBatch, NDArray[np.float32]]:
        torch.set_num_threads(1)
        batch = _decode(group, classifier)
        return batch, classifier.probabilities(batch.images) if len(batch.images) else none

    threads = torch.get_num_threads()
    try:
        yield from in_order(predicted, groups)
    finally:
        torch.set_num_threads(threads)  # the setting also affects later threads


def _decode(files: Sequence[Picture], classifier: ImageClassifier) -> PredictedBatch:
    images: list[NDArray[np.uint8]] = []
    reasons: list[str | None] = []
    for picture in files:
        reason = None
        try:
            images.append(_pixels(picture, classifier))
        except ObjectMissing:  # it was deleted after it was listed
            reason = "no such object"
        except ServiceError:
            raise
        except Exception as error:  # on damaged bytes Pillow's decoders raise almost anything
            reason = getattr(error, "strerror", None) or reason_of(error)
        reasons.append(reason)
    stack = np.stack(images) if images else np.empty((0, *classifier.target.shape), dtype=np.uint8)
    return PredictedBatch(tuple(picture.name for picture in files), stack, tuple(reasons))


def _pixels(picture: Picture, classifier: ImageClassifier) -> NDArray[np.uint8]:
    """Returns pixels as preprocessing would; refuses colour images if the model was trained on grey ones only."""
    check_size(picture.size)
    data = picture.read()
    if not classifier.colour and not read_header(data).grey:
        pixels = decode_image(data, classifier.target._replace(channels=3)).astype(np.int16)
        if np.ptp(pixels, axis=0).max() > GREY_SPREAD:
            raise ValueError("a colour image, and the model was trained on grey ones only")
    return decode_image(data, classifier.target)
