"""Computes the numbers of an evaluation: scores, confusion matrix, calibration, latency."""

import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from cnn.errors import InputError
from cnn.evaluation.calibration import Reliability, reliability, temperature_note
from infra.records import Record
from tasks.evaluation.binomial import wilson_interval

EXAMPLES = 24  # images of each kind in the gallery
TOP_K = (3, 5)
TIMED_BATCHES = (1, 64)
WARM_UP_CALLS, TIMED_CALLS = 2, 10  # per batch size


class Scores(Record):
    """Precision, recall and their harmonic mean; 0 where the divisor is 0."""

    precision: float
    recall: float
    f1: float


class ClassScores(Scores):
    """Scores of one class against the rest."""

    name: str

    support: int
    """Images of this class."""


class SliceScores(Record):
    """Accuracy on the images that have one value of a metadata column."""

    value: str
    images: int
    accuracy: float
    interval: tuple[float, float]
    """Wilson's 95 % interval of the accuracy."""


class Calibration(Record):
    """Calibration of the network's probabilities, as trained and with logits divided by a temperature."""

    temperature: float
    """Fitted on another split than the report's; 1 changes nothing."""

    ece_before: float
    """Expected calibration error in 15 bins (Guo et al., 2017)."""

    ece_after: float
    loss_after: float
    """Mean cross-entropy in nats, with the temperature."""

    before: Reliability
    after: Reliability

    remark: str = ""
    """A remark for readers about the temperature; may be empty."""


class Example(Record):
    """An image and its prediction; probabilities are as trained."""

    index: int
    """Position in the split."""

    label: int
    predicted: int
    probability: float
    """Probability of the predicted class."""

    true_probability: float

    path: str = ""
    """The image's file in the source; empty if it is not known."""


class Footprint(Record):
    """Size and speed of a network."""

    device: str
    """`cpu` or `cuda`."""

    threads: int
    """PyTorch's threads on the CPU."""

    size_bytes: int
    """Parameters and buffers."""

    latency_ms: dict[int, float]
    """Milliseconds per image, by batch size: the median of ten calls."""


class EvaluationReport(Record):
    """Results of a network on a split."""

    split: str
    images: int

    accuracy: float
    """Share of the images whose most probable class is right."""

    accuracy_interval: tuple[float, float]
    """Wilson's 95 % interval."""

    top_k: dict[int, float]
    """Share of the images whose class is among the k most probable, for k below the number of classes."""

    loss: float
    """Mean cross-entropy in nats, without label smoothing or class weights."""

    macro: Scores
    """Unweighted mean over the classes that occur, as label or as prediction."""

    weighted: Scores
    """Mean over the classes, weighted by support."""

    classes: tuple[ClassScores, ...]

    confusion: tuple[tuple[int, ...], ...]
    """Images by [true class][predicted class]."""

    calibration: Calibration

    slices: dict[str, tuple[SliceScores, ...]]
    """By `class`, and by each column of metadata."""

    confidently_wrong: tuple[Example, ...]
    """Misclassified images, the highest probability of the predicted class first."""

    hardest: tuple[Example, ...]
    """Other images, the smallest gap between the two most probable classes first."""

    footprint: Footprint | None = None

    @property
    def headline(self) -> str:
        """The accuracy with its interval, as Markdown."""
        low, high = self.accuracy_interval
        return (
            f"**{self.accuracy:.2%}** of {self.images:,} {self.split} images right "
            f"(95 % interval {low:.2%} to {high:.2%})"
        )

    def mistakes(self, most: int) -> list[tuple[str, str, int]]:
        """Returns the most frequent confusions: true class, predicted class, number of images."""
        counts = np.array(self.confusion)
        np.fill_diagonal(counts, 0)
        names = [scores.name for scores in self.classes]
        places = np.argsort(-counts, axis=None, kind="stable")[:most].tolist()
        pairs = (divmod(place, len(counts)) for place in places if counts.flat[place])
        return [(names[true], names[predicted], int(counts[true, predicted])) for true, predicted in pairs]

    def metrics(self) -> dict[str, float]:
        """Returns the figures by which MLflow compares runs; equal prefixes share a chart section there."""
        found = {
            "accuracy": self.accuracy,
            "accuracy_low": self.accuracy_interval[0],
            "accuracy_high": self.accuracy_interval[1],
            "loss": self.loss,
            "macro_f1": self.macro.f1,
            "macro_precision": self.macro.precision,
            "macro_recall": self.macro.recall,
            "weighted_f1": self.weighted.f1,
            **{f"top_{k}_accuracy": share for k, share in self.top_k.items()},
            "temperature": self.calibration.temperature,
            "ece": self.calibration.ece_before,
            "ece_calibrated": self.calibration.ece_after,
            "loss_calibrated": self.calibration.loss_after,
        }
        if self.footprint:
            found["size_bytes"] = self.footprint.size_bytes
            found |= {f"latency_ms_batch_{n}": value for n, value in self.footprint.latency_ms.items()}
        return {f"{self.split}/{name}": value for name, value in found.items()}

    def with_paths(self, paths: Sequence[str | None]) -> "EvaluationReport":
        """Returns the report with the files of its examples, given those of all images of the split."""
        kinds = {"confidently_wrong": self.confidently_wrong, "hardest": self.hardest}
        return self.model_copy(
            update={
                kind: tuple(each.model_copy(update={"path": paths[each.index] or ""}) for each in found)
                for kind, found in kinds.items()
            }
        )

    def confusion_json(self) -> str:
        """Returns the confusion matrix alone, with the names of its rows and columns."""
        names = [scores.name for scores in self.classes]
        return json.dumps({"classes": names, "counts": self.confusion})


def evaluation_report(
    split: str,
    logits: Tensor,
    labels: Tensor,
    classes: Sequence[str],
    *,
    temperature: float = 1.0,
    slices: Mapping[str, Sequence[object]] | None = None,
    footprint: Footprint | None = None,
) -> EvaluationReport:
    """Compares predictions with labels.

    Args:
        split: name of the split, for example `test`.
        logits: float32 [N, classes], N ≥ 1.
        labels: int64 [N].
        classes: names, by label.
        temperature: from `cnn.evaluation.calibration.fit_temperature` on another split's logits.
        slices: columns of metadata by name, each with one value per image.
        footprint: from `measure_footprint`.

    Raises:
        InputError: a column does not have one value per image.
    """
    truth, predicted = labels.numpy(), logits.argmax(1).numpy()
    right = truth == predicted
    confusion = np.bincount(truth * len(classes) + predicted, minlength=len(classes) ** 2).reshape(len(classes), -1)
    scores, support = _scores(confusion), confusion.sum(1)
    occurring = (support + confusion.sum(0) > 0).astype(np.float64)
    likeliest = logits.topk(min(max(TOP_K), len(classes)), dim=1).indices == labels[:, None]
    columns = {f"column {name}" if name == "class" else name: values for name, values in (slices or {}).items()}
    columns["class"] = np.asarray(list(classes))[truth]
    wrong, hardest = _examples(logits, labels)
    return EvaluationReport(
        split=split,
        images=len(labels),
        accuracy=float(right.mean()),
        accuracy_interval=wilson_interval(int(right.sum()), len(labels)),
        top_k={k: float(likeliest[:, :k].any(1).double().mean()) for k in TOP_K if k < len(classes)},
        loss=float(F.cross_entropy(logits.double(), labels)),
        macro=_average(scores, occurring),
        weighted=_average(scores, support),
        classes=tuple(
            ClassScores(name=name, precision=precision, recall=recall, f1=f1, support=images)
            for name, (precision, recall, f1), images in zip(classes, scores.tolist(), support.tolist(), strict=True)
        ),
        confusion=tuple(map(tuple, confusion.tolist())),
        calibration=_calibration(logits, labels, temperature),
        slices={name: tuple(_sliced(name, values, right)) for name, values in columns.items()},
        confidently_wrong=wrong,
        hardest=hardest,
        footprint=footprint,
    )


def _scores(confusion: NDArray[np.int64]) -> NDArray[np.float64]:
    """Returns precision, recall and F1 of each class [classes, 3]; 0 where the divisor is 0."""
    right, predicted, true = confusion.diagonal(), confusion.sum(0), confusion.sum(1)
    parts, wholes = np.stack([right, right, 2 * right], 1), np.stack([predicted, true, predicted + true], 1)
    scores: NDArray[np.float64] = parts / np.maximum(wholes, 1)
    return scores


def _average(scores: NDArray[np.float64], weights: NDArray[Any]) -> Scores:
    precision, recall, f1 = np.average(scores, axis=0, weights=weights).tolist()
    return Scores(precision=precision, recall=recall, f1=f1)


def _calibration(logits: Tensor, labels: Tensor, temperature: float) -> Calibration:
    cooled = logits.double() / temperature
    before, after = reliability(logits.double().softmax(1), labels), reliability(cooled.softmax(1), labels)
    return Calibration(
        temperature=temperature,
        ece_before=before.ece,
        ece_after=after.ece,
        loss_after=float(F.cross_entropy(cooled, labels)),
        before=before,
        after=after,
        remark=temperature_note(temperature),
    )


def _sliced(name: str, values: Sequence[object] | NDArray[np.str_], right: NDArray[np.bool_]) -> Iterable[SliceScores]:
    if len(values) != len(right):
        raise InputError(f"the slice column {name!r} has {len(values)} values for {len(right)} images")
    found, places = np.unique(np.asarray([str(value) for value in values]), return_inverse=True)
    counts, hits = np.bincount(places), np.bincount(places, weights=right)
    for value, images, hit in zip(found.tolist(), counts.tolist(), hits.tolist(), strict=True):
        yield SliceScores(value=value, images=images, accuracy=hit / images, interval=wilson_interval(int(hit), images))


def _examples(logits: Tensor, labels: Tensor) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Returns the most confidently wrong images, and the hardest of the others."""
    probabilities = logits.double().softmax(1)
    best = probabilities.topk(min(2, logits.shape[1]), dim=1)
    predicted, gap = best.indices[:, 0], best.values[:, 0] - best.values[:, -1]
    wrong = (predicted != labels).nonzero().squeeze(1)
    wrong = wrong[best.values[wrong, 0].argsort(descending=True, stable=True)][:EXAMPLES]
    gap[wrong] = torch.inf
    hardest = gap.argsort(stable=True)[: min(EXAMPLES, len(labels) - len(wrong))]

    return examples(logits, labels, wrong), examples(logits, labels, hardest)


def examples(logits: Tensor, labels: Tensor, chosen: Tensor) -> tuple[Example, ...]:
    """Returns the predictions for the images at the chosen positions, int64 [n]."""
    probabilities = logits[chosen].double().softmax(1)
    predicted = probabilities.argmax(1)
    return tuple(
        Example(
            index=int(chosen[place]),
            label=int(labels[chosen[place]]),
            predicted=int(predicted[place]),
            probability=float(probabilities[place, predicted[place]]),
            true_probability=float(probabilities[place, labels[chosen[place]]]),
        )
        for place in range(len(chosen))
    )


def measure_footprint(network: nn.Module, images: Tensor, device: torch.device) -> Footprint:
    """Measures a network's size, and its time per image, alone and in a batch of 64.

    Args:
        network: on the device, in evaluation mode, with its normalisation.
        images: uint8 N×C×H×W, N ≥ 1; repeated where a batch needs more.
    """

    def latency(size: int) -> float:
        batch = images[torch.arange(size) % len(images)].to(device)
        # `cpu` waits until a GPU has finished.
        return median_ms(lambda: network(batch).cpu(), warm_up=WARM_UP_CALLS, timed=TIMED_CALLS) / size

    tensors = [*network.parameters(), *network.buffers()]
    with torch.inference_mode():
        latency_ms = {size: latency(size) for size in TIMED_BATCHES}
    return Footprint(
        device=device.type,
        threads=torch.get_num_threads(),
        size_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        latency_ms=latency_ms,
    )


def median_ms(call: Callable[[], object], *, warm_up: int, timed: int) -> float:
    """Returns the median time of a call in milliseconds, after calls that are not timed."""
    seconds = []
    for _ in range(warm_up + timed):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return 1000 * statistics.median(seconds[warm_up:])
