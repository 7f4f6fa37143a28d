"""The first screen of a run's report: accuracy, verdict, what changed against the champion, what the data gate saw."""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from PIL import Image
from pydantic import ValidationError

from cnn.data.checks import DataChecks
from cnn.data.split_reader import SplitReader
from infra.tracking.tags import EXPIRED, REFUSED, VersionRecord
from tasks.data.data_gate import SHOWN_AS, outcome_counts
from tasks.evaluation.changes import ChangedImage, Changes, ClassChange
from tasks.evaluation.report import EvaluationReport
from tasks.release.quality.verdict import Verdict
from tasks.release.serving_gate import ServingReport
from tasks.reporting.drawing import images_at, rgb

LISTED_CLASSES = 4  # better ones, and as many worse ones
LISTED_FINDINGS = 3  # of the data gate

STYLE = """
.tiles { display: grid; grid-template-columns: 1fr 1fr; gap: 0 1rem } .tiles .name { font-weight: 600 }
.tiles section { border: 1px solid #dde3ea; border-radius: .5rem; padding: .5rem 1rem; margin-bottom: 1rem }
.tiles p, .tiles ul { margin: .25rem 0 } .tiles ul { padding-left: 1.25rem } .tiles { line-height: 1.375 }
.large { font-size: 1.75rem; line-height: 1.25 } .good { color: #1a7f37 } .bad { color: #b42318 }
.images { display: flex; flex-wrap: wrap; gap: .5rem } .images figure { margin: 0; width: 5.25rem; font-size: .75rem }
.images figcaption { overflow-wrap: anywhere; line-height: 1.25 }
.images img { width: 4rem; height: 4rem; object-fit: contain; image-rendering: pixelated }
"""


def first_screen(folder: Path, thumbnails: Mapping[int, str], record: VersionRecord) -> str:
    """Returns four tiles and the changed images, as HTML; parts whose JSON file is missing say so.

    Args:
        folder: holds the run's `report/`.
        thumbnails: addresses of pictures of changed images, by position in the test split.
        record: of the version, for a person's decision.
    """
    try:
        checks = DataChecks.model_validate_json((folder / "data.json").read_bytes())
    except (OSError, ValidationError):  # missing, or written by another version
        checks = None
    evaluation = EvaluationReport.from_file(folder / "evaluation.json")
    verdict = Verdict.from_file(folder / "verdict.json")
    changed = _changed_images(verdict.changes, verdict, thumbnails) if verdict and verdict.changes else ("", "")
    columns = (
        _tile("Accuracy", _accuracy(evaluation)) + _tile("Against the champion", _against(verdict)),
        _tile("Verdict", _verdict(verdict, ServingReport.from_file(folder / "serving.json"), record))
        + _tile("Data", _data(checks)),
        *changed,
    )
    return f'<div class="tiles">{"".join(f"<div>{column}</div>" for column in columns if column)}</div>'


def _tile(name: str, body: str) -> str:
    return f'<section><p class="name">{name}</p>{body}</section>'


def make_thumbnails(changes: Changes, split: SplitReader) -> dict[int, str]:
    """Returns the changed images as `data:` addresses of PNG files, by position in the split."""
    indices = [each.index for each in (*changes.newly_right, *changes.newly_wrong)]
    found = {}
    for index, image in zip(indices, images_at(split, indices) if indices else (), strict=True):
        buffer = io.BytesIO()
        Image.fromarray(rgb(image.numpy())).save(buffer, "PNG")
        found[index] = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return found


def _accuracy(report: EvaluationReport | None) -> str:
    if report is None:
        return "<p>not evaluated</p>"
    low, high = report.accuracy_interval
    return (
        f'<p class="large">{report.accuracy:.2%}</p><p>of {report.images:,} {escape(report.split)} images right. '
        f"On other images of the same kind very likely {low:.2%} to {high:.2%} (95 % interval).</p>"
    )


def _verdict(verdict: Verdict | None, serving: ServingReport | None, record: VersionRecord) -> str:
    if serving and not serving.passed:
        return '<p class="large bad">Refused</p><p>by the serving gate: it does not serve what was evaluated</p>'
    if verdict is None:
        return '<p class="large">None</p><p>the quality gate was not reached</p>'
    said = [text for heading, text in verdict.explanation() if heading == "Refused because of"]
    gaps = [f"not tested: {gap}" for gap in verdict.gaps]
    decided = [f"approval: {sentence}"] if (sentence := record.approval_sentence) else []
    outcome = '<p class="large good">Passed</p>' if verdict.passed else '<p class="large bad">Refused</p>'
    if verdict.passed and record.approval in (REFUSED, EXPIRED):
        outcome = '<p class="large bad">Not approved</p><p>The gates have passed it.</p>'
    return outcome + _list((*decided, *said, *gaps))


def _against(verdict: Verdict | None) -> str:
    if verdict is None:
        return "<p>not compared</p>"
    if not verdict.champion:
        return "<p>There was no champion: nothing to compare with.</p>"
    if verdict.champion_accuracy is None or verdict.gain is None:
        return f"<p>{escape(verdict.champion)} could not be compared.</p>"
    points = 100 * verdict.gain
    colour = "good" if points > 0 else "bad" if points < 0 else ""
    body = (
        f'<p class="large {colour}">{points:+.2f} points</p>'
        f"<p>against {escape(verdict.champion)}, {verdict.champion_accuracy:.2%}: {verdict.only_challenger:,} images "
        f"newly right, {verdict.only_champion:,} newly wrong.</p>"
    )
    if verdict.changes:
        changed = verdict.changes.classes
        better = [each for each in reversed(changed) if each.now > each.before]
        worse = [each for each in changed if each.now < each.before]
        body += _list(_classes(word, found) for word, found in (("better", better), ("worse", worse)) if found)
    return body


def _classes(word: str, changed: Sequence[ClassChange]) -> str:
    listed = ", ".join(
        f"{each.name}: {each.before:,} → {each.now:,} of {each.images:,}" for each in changed[:LISTED_CLASSES]
    )
    more = f" and {len(changed) - LISTED_CLASSES} more" if len(changed) > LISTED_CLASSES else ""
    return f"{len(changed)} class{'es' * (len(changed) > 1)} {word}: {listed}{more}"


def _data(checks: DataChecks | None) -> str:
    if checks is None:
        return "<p>no report of the data gate</p>"
    outcome = {"passed": "Passed", "warned": "Passed with warnings", "failed": "Refused"}[checks.outcome]
    images = ", ".join(f"{split} {facts.images:,}" for split, facts in checks.splits.items())
    found = [check for outcome in ("failed", "warned") for check in checks.with_outcome(outcome)]
    listed = [f"{SHOWN_AS.get(check.outcome, check.outcome)}: {check.name}, {check.note}" for check in found]
    if len(listed) > LISTED_FINDINGS:
        listed[LISTED_FINDINGS:] = [f"and {len(listed) - LISTED_FINDINGS} more"]
    colour = "bad" if checks.outcome == "failed" else "good"
    return f'<p class="large {colour}">{outcome}</p><p>{images} images; {outcome_counts(checks)}</p>{_list(listed)}'


def _changed_images(changes: Changes, verdict: Verdict, thumbnails: Mapping[int, str]) -> tuple[str, str]:
    """Returns the tiles of the images that are newly right, and of those that are newly wrong."""

    def tile(name: str, count: int, images: Sequence[ChangedImage], captions: Iterable[str]) -> str:
        figures = "".join(
            f'<figure><img alt="test image {image.index}" src="{thumbnails[image.index]}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
            for image, caption in zip(images, captions, strict=True)
            if image.index in thumbnails
        )
        return _tile(f"{name} ({len(images)} of {count:,} images)", f'<div class="images">{figures}</div>')

    return (
        tile(
            "Newly right",
            verdict.only_challenger,
            changes.newly_right,
            (f"{each.label}, was taken for {each.before}" for each in changes.newly_right),
        ),
        tile(
            "Newly wrong",
            verdict.only_champion,
            changes.newly_wrong,
            (f"{each.label}, is taken for {each.now}" for each in changes.newly_wrong),
        ),
    )


def _list(lines: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""
