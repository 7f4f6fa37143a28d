"""Reports whose figures can be counted by hand."""

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow.artifacts import download_artifacts
from mlflow.tracking import MlflowClient
from PIL import ImageDraw
from prefect import flow
from prefect.artifacts import Artifact
from prefect.context import refresh_global_settings_context
from safetensors.torch import save_file
from scipy.stats import binomtest
from sklearn.datasets import load_digits
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from torchmetrics.functional.classification import multiclass_accuracy

from cnn.data.mapped_split import MappedSplit
from cnn.errors import InputError
from cnn.networks.wrappers import Normalise
from infra.tracking import mlflow_runs
from tasks.evaluation.figures import confusion_figure, gallery_picture, heat_map_picture, reliability_figure
from tasks.evaluation.heat_maps import MAPPED, HeatMap, heat_maps
from tasks.evaluation.publish import publish_evaluation, report_markdown
from tasks.evaluation.report import EvaluationReport, evaluation_report, measure_footprint
from tasks.reporting.drawing import LINE, TILE, TITLE, Section, gallery, png
from tests.tasks.galleries import as_tile, height_of, tile


@pytest.fixture
def report() -> EvaluationReport:
    """Two cats and three dogs, one of which is classified as a cat; there is no bird, and none is predicted."""
    labels = torch.tensor([0, 0, 1, 1, 1])
    logits = torch.full((5, 3), -100.0)
    for image, predicted in enumerate((0, 0, 1, 1, 0)):
        logits[image, predicted] = 0.0
    logits[4, 1] = -math.log(3)  # probabilities 3/4 and 1/4
    return evaluation_report("test", logits, labels, ("cat", "dog", "bird"))


def test_figures_are_those_counted_by_hand(report: EvaluationReport) -> None:
    cat, dog, bird = report.classes
    assert (report.images, report.accuracy) == (5, 0.8)
    assert report.loss == pytest.approx(math.log(4) / 5)
    assert (cat.name, cat.precision, cat.recall, cat.support) == ("cat", pytest.approx(2 / 3), 1.0, 2)
    assert (dog.precision, dog.recall, dog.f1, dog.support) == (
        1.0,
        pytest.approx(2 / 3),
        pytest.approx(0.8),
        3,
    )
    assert (bird.precision, bird.recall, bird.f1, bird.support) == (0.0, 0.0, 0.0, 0)
    assert report.confusion == ((2, 0, 0), (1, 2, 0), (0, 0, 0))


def test_class_that_does_not_occur_stays_out_of_the_means(report: EvaluationReport) -> None:
    assert report.macro.recall == pytest.approx((1 + 2 / 3) / 2)
    assert report.weighted.recall == pytest.approx(0.8)
    assert report.metrics()["test/macro_f1"] == pytest.approx(0.8)


def test_figures_are_those_of_scikit_learn_torchmetrics_and_scipy() -> None:
    """Twelve classes, of which two never occur and one is never predicted."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (500,), generator=generator)
    logits = torch.randn(500, 12, generator=generator)
    logits[range(500), labels] += 1.5
    logits[:, [3, 11]] = -torch.inf
    names = [f"c{number}" for number in range(12)]
    report = evaluation_report("test", logits.clamp(min=-50), labels, names)
    truth, predicted = labels.numpy(), logits.argmax(1).numpy()
    told = {"labels": range(12), "zero_division": 0.0}
    theirs = zip(*precision_recall_fscore_support(truth, predicted, **told), strict=True)
    ours = [(each.precision, each.recall, each.f1, each.support) for each in report.classes]
    assert ours == [pytest.approx(figures) for figures in theirs]
    assert report.confusion == tuple(map(tuple, confusion_matrix(truth, predicted, labels=range(12)).tolist()))
    occurring = sorted({*truth.tolist(), *predicted.tolist()})
    assert occurring == list(range(11))
    for kind, means in (("macro", report.macro), ("weighted", report.weighted)):
        theirs = precision_recall_fscore_support(truth, predicted, labels=occurring, average=kind, zero_division=0.0)[
            :3
        ]
        assert (means.precision, means.recall, means.f1) == pytest.approx(theirs)
    for k in (3, 5):
        top = multiclass_accuracy(logits.clamp(min=-50), labels, 12, average="micro", top_k=k)
        assert report.top_k[k] == pytest.approx(float(top))
    right = int((truth == predicted).sum())
    wilson = binomtest(right, 500).proportion_ci(0.95, method="wilson")
    assert report.accuracy_interval == pytest.approx((wilson.low, wilson.high))


def test_report_survives_json(report: EvaluationReport) -> None:
    assert EvaluationReport.model_validate_json(report.model_dump_json()) == report
    assert json.loads(report.confusion_json())["counts"][1] == [1, 2, 0]


def test_page_names_the_mistake(report: EvaluationReport) -> None:
    page = report_markdown(report)
    assert "**80.00%** of 5 test images right" in page
    assert "| dog | cat | 1 |" in page


@pytest.mark.parametrize("classes", [2, 30])
def test_picture_shows_every_class(classes: int) -> None:
    labels = torch.arange(classes)
    names = [f"class {number}" for number in range(classes)]
    figure = confusion_figure(evaluation_report("test", torch.eye(classes), labels, names))
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == names
    assert [text.get_text() for text in axes.texts] == (["1"] * classes if classes == 2 else [])


def test_names_of_classes_may_hold_dollars() -> None:
    """Which matplotlib would read as formulas."""
    classes = ("$", "$$", "$5_$10")
    assert png(confusion_figure(evaluation_report("test", torch.eye(3), torch.arange(3), classes)))


def test_accuracy_has_wilsons_interval(report: EvaluationReport) -> None:
    """4 of 5 right: (p + z²/2n ± z·√(p(1-p)/n + z²/4n²)) / (1 + z²/n), Wilson (1927)."""
    z, p, n = 1.959964, 0.8, 5
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((middle + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    assert report.accuracy_interval == pytest.approx((low, high), abs=1e-6)


def test_top_k_counts_the_classes_that_are_likely_enough() -> None:
    logits = torch.arange(7.0).flip(0).expand(7, 7)  # class 0 is always the likeliest, then 1, 2, ...
    report = evaluation_report("test", logits, torch.arange(7), [str(number) for number in range(7)])
    assert report.top_k == pytest.approx({3: 3 / 7, 5: 5 / 7})
    assert report.metrics()["test/top_5_accuracy"] == pytest.approx(5 / 7)
    assert evaluation_report("test", torch.eye(3), torch.arange(3), "abc").top_k == {}


def test_temperature_changes_probabilities_and_no_prediction() -> None:
    logits, labels = 4 * torch.eye(2).repeat(5, 1), torch.tensor([0, 1] * 4 + [1, 0])  # 8 of 10 right
    plain = evaluation_report("test", logits, labels, "ab")
    temperature = 4 / math.log(4)  # makes the confidence 80 %
    cooled = evaluation_report("test", logits, labels, "ab", temperature=temperature)
    assert (plain.calibration.temperature, cooled.accuracy) == (1.0, plain.accuracy)
    assert plain.calibration.ece_before == plain.calibration.ece_after
    assert cooled.calibration.ece_before == pytest.approx(1 / (1 + math.exp(-4)) - 0.8)
    assert cooled.calibration.ece_after == pytest.approx(0, abs=1e-4)
    assert cooled.calibration.loss_after < cooled.loss
    assert cooled.metrics()["test/temperature"] == temperature


def test_worst_images_are_named_with_what_they_were_taken_for(report: EvaluationReport) -> None:
    (wrong,) = report.confidently_wrong
    assert (wrong.index, wrong.label, wrong.predicted) == (4, 1, 0)
    assert (wrong.probability, wrong.true_probability) == pytest.approx((0.75, 0.25))
    assert sorted(each.index for each in report.hardest) == [0, 1, 2, 3]


def test_hardest_images_are_those_with_the_smallest_gap_and_wrong_ones_are_sorted_by_their_confidence() -> None:
    logits = torch.tensor([[3.0, 0.0], [0.2, 0.0], [1.0, 0.0], [2.0, 0.0], [4.0, 0.0]])
    report = evaluation_report("test", logits, torch.tensor([0, 0, 0, 1, 1]), "ab")
    assert [each.index for each in report.confidently_wrong] == [4, 3]
    assert [each.index for each in report.hardest] == [1, 2, 0]


def test_slices_are_by_class_and_by_every_column_that_is_given() -> None:
    logits, labels = torch.eye(4), torch.tensor([0, 1, 2, 0])
    given = {"camera": ["x", "y", "x", "y"], "class": ["car", "car", "van", "van"]}
    report = evaluation_report("test", logits, labels, "abcd", slices=given)
    assert [each.value for each in report.slices["column class"]] == ["car", "van"]
    by_class, camera = report.slices["class"], report.slices["camera"]
    assert [(s.value, s.images, s.accuracy) for s in by_class] == [("a", 2, 0.5), ("b", 1, 1.0), ("c", 1, 1.0)]
    assert [(s.value, s.images, s.accuracy) for s in camera] == [("x", 2, 1.0), ("y", 2, 0.5)]
    assert camera[1].interval[0] < 0.5 < camera[1].interval[1]
    assert "| y | 50.00% |" in report_markdown(report)


def test_column_that_lacks_values_is_refused() -> None:
    with pytest.raises(InputError, match="'camera' has 2 values for 3 images"):
        evaluation_report("test", torch.eye(3), torch.arange(3), "abc", slices={"camera": ["x", "y"]})


def test_footprint_is_measured_on_batches_of_one_and_of_64() -> None:
    seen: list[int] = []

    class Network(torch.nn.Linear):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(len(images))
            time.sleep(0.002)
            return super().forward(images.flatten(1).float())

    images = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
    found = measure_footprint(Network(4, 5), images, torch.device("cpu"))
    assert set(seen) == {1, 64}
    assert found.size_bytes == 4 * (4 * 5 + 5)
    assert found.latency_ms[1] >= 2
    assert 2 / 64 <= found.latency_ms[64] < found.latency_ms[1]
    report = evaluation_report("test", torch.eye(3), torch.arange(3), "abc", footprint=found)
    assert report.metrics()["test/size_bytes"] == 100
    assert EvaluationReport.model_validate_json(report.model_dump_json()) == report
    assert "(batch 64)" in report_markdown(report)


@pytest.fixture
def split(tmp_path: Path) -> MappedSplit:
    """The first 60 digits."""
    data = load_digits()
    images = torch.from_numpy(data.images[:60] * 15).to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(data.target[:60]).long()
    save_file({"images": images, "labels": labels}, tmp_path / "split.safetensors")
    return MappedSplit([tmp_path / "split.safetensors"])


def guesses(split: MappedSplit, temperature: float = 1.0) -> EvaluationReport:
    """Returns the report of a network that is right in about two of three cases."""
    return evaluation_report("test", guessed_logits(split), split.labels, "0123456789", temperature=temperature)


def guessed_logits(split: MappedSplit) -> torch.Tensor:
    torch.manual_seed(0)
    logits = 3 * torch.randn(len(split), 10)
    logits[torch.arange(0, 60, 2), split.labels[::2]] += 8
    return logits


def test_gallery_shows_the_images_themselves_with_label_and_prediction(
    split: MappedSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = guesses(split)
    captions: list[str] = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "multiline_text", lambda _, place, text, *__: captions.append(text))
    picture = gallery_picture(report, split)
    wrong, hardest = report.confidently_wrong, report.hardest
    assert len(wrong) > 8 and len(hardest) > 8
    assert captions == [
        f"model: {each.predicted} ({each.probability:.0%})\nlabel: {each.label} ({each.true_probability:.0%})"
        for each in (*wrong, *hardest)
    ]
    second = TITLE + height_of(len(wrong))
    assert picture.height == second + TITLE + height_of(len(hardest))
    for top, examples in ((0, wrong), (second, hardest)):
        for number, each in enumerate(examples):
            (image,), _ = split.slice(each.index, each.index + 1)
            assert np.array_equal(tile(picture, number, top=top), as_tile(image))


def test_gallery_writes_a_caption_above_each_image_and_says_when_there_is_none() -> None:
    images = torch.full((9, 1, 8, 8), 255, dtype=torch.uint8)
    blank, written = (np.asarray(gallery([Section("", images, [caption] * 9)])) for caption in ("", "cat\ndog"))
    changed = np.argwhere((blank != written).any(2))
    assert blank.min() == 255 and TITLE < changed[:, 0].min() < TITLE + 2 * LINE - 20
    assert not (blank != written)[TITLE + 2 * LINE : TITLE + 2 * LINE + TILE].any()  # over no image
    assert np.asarray(gallery([])).min() < 255
    three, two = (gallery([Section("", images, [caption] * 9)]) for caption in ("cat\ndog\nfile", "cat\ndog"))
    assert three.height == two.height + 2 * LINE  # of two rows


class Constant(torch.nn.Module):
    """A map of three pixels per side, whose middle speaks for every class; more pixels on request."""

    def __init__(self, side: int = 3) -> None:
        super().__init__()
        self.maps, self.linear = torch.nn.AdaptiveAvgPool2d(side), torch.nn.Linear(1, 10)
        torch.nn.init.ones_(self.linear.weight)
        self.side = side

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        middle = torch.zeros_like(images)
        middle[:, :, 3:5, 3:5] = 1.0
        return self.linear(self.maps(middle).mean((2, 3)))  # type: ignore[no-any-return]


def test_heat_maps_are_of_the_worst_mistakes_and_of_right_images_of_all_classes(split: MappedSplit) -> None:
    report, logits = guesses(split), guessed_logits(split)
    maps = heat_maps(report, logits, split, Normalise((0.5,), (0.5,)), Constant())
    wrong, right = maps[:MAPPED], maps[MAPPED:]
    assert [each.example for each in wrong] == list(report.confidently_wrong[:MAPPED])
    assert all(each.example.label == each.example.predicted == int(split.labels[each.example.index]) for each in right)
    assert len({each.example.index for each in right}) == len(right) == MAPPED
    known = split.labels[logits.argmax(1) == split.labels].unique()
    assert {each.example.label for each in right} == set(known.tolist()) and len(known) == 9
    assert all(each.rows[1][1] == 255 and sum(map(sum, each.rows)) < 8 * 255 for each in maps)
    assert len(heat_maps(report, logits, split, Normalise((0.5,), (0.5,)), Constant(40))[0].rows) == 32
    assert heat_maps(report, logits, split, Normalise((0.5,), (0.5,)), Constant(2)) == ()

    picture = heat_map_picture(report, maps, split)
    assert picture.height == 2 * (TITLE + height_of(MAPPED, pairs=True))
    for top, examples in ((0, wrong), (picture.height // 2, right)):
        (image,), _ = split.slice(examples[0].example.index, examples[0].example.index + 1)
        assert np.array_equal(tile(picture, 0, top=top, pair=False), as_tile(image))
        below = tile(picture, 0, top=top, pair=True).astype(int)
        assert below[84, 84, 1] > below[4, 4, 1] + 50  # viridis: the more, the greener
        assert below[4, 4, 2] > below[4, 4, 1]  # nothing is violet


def test_reliability_diagram_has_a_bar_for_each_bin_with_images(split: MappedSplit) -> None:
    report = guesses(split, temperature=2.5)
    figure = reliability_figure(report)
    for axes, found in zip(figure.axes[:2], (report.calibration.before, report.calibration.after), strict=True):
        heights = [bar.get_height() for bar in axes.patches]
        assert heights == pytest.approx([a for a, n in zip(found.accuracy, found.counts, strict=True) if n])
    assert "temperature 2.500" in figure.axes[1].get_title()


@pytest.mark.long
def test_published_report_is_whole(stack: object, split: MappedSplit, tmp_path: Path) -> None:
    refresh_global_settings_context()  # Prefect was imported before the stack named its server
    report = guesses(split, temperature=2.5)
    maps = [HeatMap(example=each, rows=((0, 9, 255),) * 3) for each in report.confidently_wrong[:2]]
    run_id = mlflow_runs.start_run("report-tests", "run", {}, {})

    @flow
    def publishing() -> None:
        publish_evaluation(run_id, report, split, maps)

    publishing()
    run = MlflowClient().get_run(run_id)
    assert run.data.metrics == pytest.approx(report.metrics() | {"accuracy/test": report.accuracy})
    assert run.data.tags["convoy.temperature"] == "2.5"
    folder = Path(download_artifacts(run_id=run_id, artifact_path="report", dst_path=str(tmp_path)))
    assert EvaluationReport.model_validate_json((folder / "evaluation.json").read_text()) == report
    for picture in ("confusion_matrix", "reliability", "gallery", "grad_cam"):
        assert (folder / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    page = Artifact.get("evaluation")
    assert page is not None and page.data == (folder / "evaluation.md").read_text() == report_markdown(report)
