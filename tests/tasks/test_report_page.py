"""The report's first screen, and what differs between two versions' answers, on images that can be counted by hand."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits

from cnn.data.mapped_split import MappedSplit
from tasks.config.gates import GateConfig
from tasks.evaluation.changes import EXAMPLES, OTHER_CLASS, find_changes
from tasks.evaluation.report import evaluation_report
from tasks.release.quality.checks import Scored
from tasks.release.quality.judge import judge
from tasks.release.quality.verdict import Verdict
from tasks.release.report_page import html_page
from tasks.release.report_summary import make_thumbnails
from tasks.release.serving_gate import ServingCheck, ServingReport

CLASSES = ("cat", "dog <b>", "bird")
LABELS = np.array([0] * 4 + [1] * 4 + [2] * 4)


def answers(*wrong: tuple[int, int]) -> NDArray[np.int64]:
    """Returns right answers, except for these images and their answers."""
    predicted = LABELS.copy()
    for image, answer in wrong:
        predicted[image] = answer
    return predicted


BEFORE, NOW = answers((0, 1), (1, -1), (8, 0)), answers((0, 2), (4, 0), (5, 0))


def verdict(before: NDArray[np.int64] | None = BEFORE, **conditions: float) -> Verdict:
    now = Scored(address="m/2", correct=NOW == LABELS, predicted=NOW)
    champion = Scored(address="m/1", correct=before == LABELS, predicted=before) if before is not None else None
    return judge(now, champion, GateConfig.model_validate(conditions), labels=LABELS, classes=CLASSES)


def test_changes_are_those_counted_by_hand() -> None:
    changes = verdict().changes
    assert changes is not None
    assert [(each.name, each.images, each.before, each.now) for each in changes.classes] == [
        ("dog <b>", 4, 4, 2),
        ("cat", 4, 2, 3),
        ("bird", 4, 3, 4),
    ]
    assert [(each.index, each.label, each.before, each.now) for each in changes.newly_right] == [
        (1, "cat", OTHER_CLASS, "cat"),
        (8, "bird", "cat", "bird"),
    ]
    assert [(each.index, each.before, each.now) for each in changes.newly_wrong] == [
        (4, "dog <b>", "cat"),
        (5, "dog <b>", "cat"),
    ]


def test_images_that_are_not_compared_have_not_changed() -> None:
    compared = np.ones(len(LABELS), dtype=np.bool_)
    compared[[1, 4]] = False
    changes = find_changes(BEFORE, NOW, LABELS, CLASSES, compared)
    assert [each.index for each in changes.newly_right] == [8]
    assert [each.index for each in changes.newly_wrong] == [5]
    assert [(each.name, each.images) for each in changes.classes] == [("dog <b>", 3), ("bird", 4)]


def test_examples_are_few_and_from_the_whole_split() -> None:
    labels = np.zeros(1000, dtype=np.int64)
    found = find_changes(labels + 1, labels, labels, CLASSES, np.ones(1000, dtype=np.bool_)).newly_right
    assert len(found) == EXAMPLES
    assert (found[0].index, found[-1].index) == (0, 999)


@pytest.fixture
def split(tmp_path: Path) -> MappedSplit:
    """Twelve digits."""
    images = torch.from_numpy(load_digits().images[:12] * 15).to(torch.uint8).unsqueeze(1)
    save_file({"images": images, "labels": torch.from_numpy(LABELS)}, tmp_path / "split.safetensors")
    return MappedSplit([tmp_path / "split.safetensors"])


def test_first_screen_shows_accuracy_verdict_changes_and_their_images(split: MappedSplit, tmp_path: Path) -> None:
    judged = verdict()
    logits = torch.nn.functional.one_hot(torch.from_numpy(NOW), 3).float()
    report = evaluation_report("test", logits, torch.from_numpy(LABELS), CLASSES)
    (tmp_path / "evaluation.json").write_text(report.model_dump_json())
    (tmp_path / "verdict.json").write_bytes(judged.to_bytes())
    (tmp_path / "verdict.md").write_text(judged.markdown())
    assert judged.changes is not None
    thumbnails = make_thumbnails(judged.changes, split)
    page = html_page("m/2", tmp_path, thumbnails)
    screen, _, rest = page.partition("<h2>")
    low, high = report.accuracy_interval
    for said in (
        '<p class="large">75.00%</p><p>of 12 test images right',
        f"{low:.2%} to {high:.2%}",
        '<p class="large bad">Refused</p>',
        '<p class="large ">+0.00 points</p>',
        "against m/1, 75.00%: 2 images newly right, 2 newly wrong",
        "2 classes better: bird: 3 → 4 of 4, cat: 2 → 3 of 4",
        "1 class worse: dog &lt;b&gt;: 4 → 2 of 4",
        "<figcaption>bird, was taken for cat</figcaption>",
        "<figcaption>dog &lt;b&gt;, is taken for cat</figcaption>",
        "not tested: class drop (no class or slice has 100 test images)",
        "no report of the data gate",
    ):
        assert said in screen, said
    assert screen.index("Newly right") < screen.index("Newly wrong")
    assert "McNemar" in rest and "@media print" in page
    assert set(thumbnails) == {1, 4, 5, 8}
    picture = Image.open(io.BytesIO(base64.b64decode(thumbnails[8].partition(",")[2])))
    assert np.array_equal(np.asarray(picture)[..., 0], split.slice(8, 9)[0][0, 0].numpy())
    assert all(address in screen for address in thumbnails.values())


def test_first_screen_of_a_first_version_says_that_nothing_was_compared(tmp_path: Path) -> None:
    (tmp_path / "verdict.json").write_bytes(verdict(None, floor=0.2).to_bytes())
    page = html_page("m/2", tmp_path, {})
    assert "There was no champion: nothing to compare with." in page
    assert "Newly" not in page
    assert '<p class="large good">Passed</p>' in page
    assert "not tested: class recall (no class has 100 test images)" in page


def test_first_screen_without_a_verdict_says_which_gate_refused(tmp_path: Path) -> None:
    assert "the quality gate was not reached" in html_page("m/2", tmp_path, {})
    check = ServingCheck(name="loads in a fresh process", passed=False, detail="no")
    report = ServingReport(model="models:/m/2", tolerance=1e-5, checks=(check,))
    (tmp_path / "serving.json").write_text(report.model_dump_json())
    assert "by the serving gate" in html_page("m/2", tmp_path, {})


def test_verdict_of_older_code_has_a_first_screen_too(tmp_path: Path) -> None:
    old = verdict().model_dump_json(exclude={"changes": True, "checks": {"__all__": {"tested", "untested", "remedy"}}})
    (tmp_path / "verdict.json").write_text(old)
    page = html_page("m/2", tmp_path, {})
    assert "2 images newly right, 2 newly wrong" in page
    assert "Newly right" not in page


def test_pictures_that_exist_are_on_the_page_with_what_they_do_not_prove(tmp_path: Path) -> None:
    (tmp_path / "evaluation.md").write_text("one")
    assert "<img" not in html_page("m/2", tmp_path, {})
    for name in ("grad_cam.png", "reliability.png"):
        Image.new("RGB", (2, 2)).save(tmp_path / name)
    page = html_page("m/2", tmp_path, {})
    assert page.count("data:image/webp;base64,") == 2 and page.count("<figcaption>") == 1
    assert "not what it saw there or whether the reason is sound" in page
