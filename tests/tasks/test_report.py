"""Reports whose figures can be counted by hand."""

import json
import math

import pytest
import torch

from tasks.report import EvaluationReport, confusion_figure, evaluation_report, report_markdown


@pytest.fixture
def report() -> EvaluationReport:
    """Two cats and three dogs, one of which is taken for a cat; no bird, and nothing taken for one."""
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
