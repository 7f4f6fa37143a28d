"""The predict task: a registered model's classes and probabilities for any number of image files, as a table."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from prefect.artifacts import create_markdown_artifact
from scipy.special import softmax

from cnn.formats.archive import MAX_MEMBER_BYTES
from cnn.formats.decode import Target, decode_image, read_header, reason_of
from cnn.threads import in_order
from infra.errors import ServiceError, UsageError
from infra.records import Record
from infra.storage.object_store import open_bucket
from infra.tracking.model_registry import RegisteredVersion
from infra.tracking.model_versions import find_version
from infra.tracking.served_model import ServedModel
from infra.tracking.tags import TEMPERATURE
from tasks.data.dataset import load_manifest
from tasks.orchestration.flow_runs import flow_run_id
from tasks.orchestration.progress import progress, run_logger
from tasks.orchestration.step import step
from tasks.prediction.inputs import Picture, pictures
from tasks.prediction.table import PredictedBatch, Unread, check_out, result_file, table_writer
from tasks.reporting.markdown import plain, table

BATCH_IMAGES, BATCH_BYTES = 64, 8 << 20  # of decoded images; what is smaller
EXAMPLES = 20  # unreadable files that are named
GREY_SPREAD = 8  # levels by which a grey photograph's colour channels may differ after JPEG
GREY_MODES = frozenset({"1", "L", "LA", "La", "I;16", "I;16L", "I;16B", "I"})


class Predictions(Record):
    """What a prediction gave."""

    model: str
    """`models:/name/version`."""

    out: str
    images: int
    """Files in the table, unreadable ones included."""

    unreadable: int
    unreadable_examples: tuple[Unread, ...]
    classes: dict[str, int]
    """Images predicted as each class that occurs, the most frequent first."""

    temperature: float

    def markdown(self) -> str:
        """For people."""
        lines = [
            f"{self.images:,} files, {self.unreadable:,} of them unreadable, "
            f"by {plain(self.model)} → {plain(self.out)}",
            "",
        ]
        lines += table(("class", "images"), self.classes.items(), "lr")
        if self.unreadable:
            examples = ((each.file, each.reason) for each in self.unreadable_examples)
            lines += ["", *table(("unreadable", "reason"), examples, "ll")]
        return "\n".join([*lines, ""])


@step("predict", retried=False)
def predict(model: str, inputs: Sequence[str], out: str) -> Predictions:
    """Predict the class of every image and write a table with a row for each file, in the inputs' order.

    Columns: `file`; `class` and its `probability`; `p_CLASS` for each class; `error`, why a file could not be used,
    in which case the others are empty. Images are decoded, resized and cropped as preprocessing does. Probabilities
    are calibrated by the temperature in the version's tag `convoy.temperature`, if it has one. Only a few batches are
    in memory, however many files there are.

    Args:
        model: `name`, which means its champion, `name@alias` or `name/version`.
        inputs: files, folders (links to folders are not followed), `s3://bucket/prefix` addresses.
        out: where the table goes, a local path or an `s3://` address; `.parquet`, `.csv`, or `.json` and `.jsonl`,
            which are JSON lines. It appears whole or not at all.

    Raises:
        UsageError: no such model or input, no image among the inputs, or no image that can be read.
        ServiceError: MLflow or the object store failed.
    """
    check_out(out)
    total = sum(1 for _ in pictures(inputs))
    served = Served(find_version(model))
    unread: list[Unread] = []
    done, unread_count, classes = 0, 0, Counter[str]()
    with (
        result_file(out) as file,
        table_writer(file, served.classes) as write,
        progress(f"Predicting with {served.version.name}", total, unit="images", artifact="predict") as advance,
    ):
        for batch, answers in predict_pictures(served, pictures(inputs)):
            write(batch, answers)
            classes.update(served.classes[answer] for answer in answers.argmax(1))
            unread_count += len(batch.unread)
            unread += batch.unread[: EXAMPLES - len(unread)]
            done += len(batch.names)
            advance(len(batch.names))
        if unread_count == done:
            raise UsageError(f"none of {done} files can be used: {unread[0].file}: {unread[0].reason}")
    result = Predictions(
        model=served.version.uri,
        out=out,
        images=done,
        unreadable=unread_count,
        unreadable_examples=tuple(unread),
        classes=dict(classes.most_common()),
        temperature=served.temperature,
    )
    if flow_run_id():
        create_markdown_artifact(result.markdown(), key="predictions", description=f"Predictions by {result.model}")
    run_logger().info("%s images predicted, %s unreadable; %s", f"{done - unread_count:,}", f"{unread_count:,}", out)
    return result


class Served(ServedModel):
    """A registered version that is loaded, and how images are prepared for it.

    Raises:
        UsageError: it is no model of ours, or cannot be loaded here.
        ServiceError: MLflow failed.
    """

    def __init__(self, version: RegisteredVersion) -> None:
        super().__init__(version)
        channels, side, _ = self.shape
        self.target = Target(side, channels)
        # Colour images may go in if the network takes them, or was trained on colour images made grey.
        self.colour = channels == 3 or _trained_on_colour(str(self.metadata.get("dataset_version")))
        self.temperature = _temperature(version)

    def probabilities(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Calibrated probabilities N×classes of raw images N×C×H×W."""
        return calibrated(self.predict(images), self.temperature)


def _trained_on_colour(dataset_version: str) -> bool:
    """Whether colour images were made grey for the training: then it is clear what to do with them."""
    try:
        manifest = load_manifest(open_bucket(), dataset_version)
    except ServiceError:  # the data may be gone, and the model still of use
        return False
    return not set(manifest.report.modes) <= GREY_MODES | {"P"}


def _temperature(version: RegisteredVersion) -> float:
    tag = version.record.temperature or "1"
    try:
        temperature = float(tag)
    except ValueError:
        temperature = 0.0
    if not 0 < temperature < float("inf"):
        raise UsageError(f"{version.uri}: its tag {TEMPERATURE} is {tag!r}, not a positive number")
    return temperature


def calibrated(probabilities: NDArray[np.float32], temperature: float) -> NDArray[np.float32]:
    """Softmax of the logits divided by the temperature, from the softmax of the logits (Guo et al. 2017)."""
    if temperature == 1.0:
        return probabilities
    with np.errstate(divide="ignore"):  # a probability of zero stays zero
        scaled = np.log(probabilities.astype(np.float64)) / temperature
    return np.asarray(softmax(scaled, axis=1), dtype=np.float32)


def predict_pictures(served: Served, files: Iterable[Picture]) -> Iterator[tuple[PredictedBatch, NDArray[np.float32]]]:
    """Batches with the probabilities of their readable images, in the files' order; decoded on threads, ahead."""
    size = max(1, min(BATCH_IMAGES, BATCH_BYTES // int(np.prod(served.target.shape))))
    for batch in in_order(lambda part: _decode(part, served), _parts(files, size)):
        if len(batch.images):
            yield batch, served.probabilities(batch.images)
        else:
            yield batch, np.empty((0, len(served.classes)), dtype=np.float32)


def _parts(files: Iterable[Picture], size: int) -> Iterator[list[Picture]]:
    rest = iter(files)
    while part := list(islice(rest, size)):
        yield part


def _decode(part: Sequence[Picture], served: Served) -> PredictedBatch:
    images, unread = [], []
    for picture in part:
        try:
            images.append(_pixels(picture, served))
        except ServiceError:
            raise
        except OSError as error:
            unread.append(Unread(file=picture.name, reason=error.strerror or reason_of(error)))
        except Exception as error:  # on damaged bytes Pillow's decoders raise almost anything
            unread.append(Unread(file=picture.name, reason=reason_of(error)))
    stack = np.stack(images) if images else np.empty((0, *served.target.shape), dtype=np.uint8)
    return PredictedBatch(tuple(picture.name for picture in part), stack, tuple(unread))


def _pixels(picture: Picture, served: Served) -> NDArray[np.uint8]:
    """Pixels as preprocessing would give them; colour images are not made grey for a model that never saw any."""
    if picture.size > MAX_MEMBER_BYTES:
        raise ValueError(f"{picture.size:,} bytes is more than {MAX_MEMBER_BYTES:,}")
    data = picture.read()
    if not served.colour and not read_header(data).grey:
        pixels = decode_image(data, Target(served.target.image_size, 3)).astype(np.int16)
        if np.ptp(pixels, axis=0).max() > GREY_SPREAD:
            raise ValueError("a colour image, and the model was trained on grey ones only")
    return decode_image(data, served.target)
