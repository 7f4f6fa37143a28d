"""Judges a version: runs the checks of the quality gate on the test split, against the champion if there is one."""

from collections.abc import Mapping

import numpy as np

from tasks.config.gates import GateConfig
from tasks.evaluation.binomial import sign_test
from tasks.evaluation.changes import find_changes
from tasks.release.quality.checks import (
    Labels,
    Mask,
    Scored,
    check_class_recall,
    check_comparison,
    check_drops,
    check_floor,
    check_known_classes,
    check_limit,
    too_small,
    wins_and_losses,
)
from tasks.release.quality.verdict import QualityCheck, Verdict


def judge(
    challenger: Scored,
    champion: Scored | None,
    config: GateConfig,
    *,
    labels: Labels,
    classes: tuple[str, ...],
    slices: Mapping[str, Mask] | None = None,
    dataset_version: str = "",
    test_sha256: str = "",
    learned: Mask | None = None,
    judged_before: int | None = None,
) -> Verdict:
    """Decides whether the challenger may replace the champion. Without a champion, floor, recall and limits decide.

    Superior: the observed gain reaches the margin, and McNemar's exact test, one-sided, is significant at `alpha`.
    Non-inferior: the lower 1 − alpha confidence bound of the difference (Tango, 1998: see tasks/evaluation/paired.py)
    is not below −margin, and the test split is large enough to show that margin at all. If there are classes that the
    champion does not know, the challenger must also be non-inferior on the others.

    Args:
        labels: int64 [N], of the same images in the same order.
        classes: names, by label.
        slices: further groups of images that must not get worse: masks [N] by name.
        learned: mask [N] of images that only the champion was trained on. They are not compared.
        judged_before: other versions that this test split has judged.
    """
    checks = [check_floor(challenger, labels, config), check_class_recall(challenger, labels, classes, config)]
    notes: list[str] = []
    wins = losses = left_out = 0
    p_value = champion_accuracy = changes = None
    if champion and champion.obstacle:
        remedy = "a champion that can be compared: `convoy promote --force --reason TEXT`"
        checks.append(
            QualityCheck(name=config.mode, threshold=0, passed=False, detail=champion.obstacle, remedy=remedy)
        )
    elif champion:
        compared = np.ones(len(labels), dtype=np.bool_) if learned is None else ~learned
        images, left_out = int(compared.sum()), int((~compared).sum())
        wins, losses = wins_and_losses(challenger.correct[compared], champion.correct[compared])
        p_value = sign_test(wins, losses)
        if champion.predicted is not None and challenger.predicted is not None:
            changes = find_changes(champion.predicted, challenger.predicted, labels, classes, compared)
        if images:
            champion_accuracy = float(champion.correct[compared].mean())
            checks.append(check_comparison(wins, losses, images, p_value, config))
            known = compared & ~np.isin(labels, list(champion.unknown))
            if 0 < known.sum() < images:
                checks.append(check_known_classes(challenger, champion, known, config))
            if small := too_small(wins, losses, images, config):
                notes.append(f"{small}; a refusal may be due to too few images")
        else:
            detail = "the champion was trained on every test image, so none can be compared"
            remedy = "test images that the champion was not trained on"
            checks.append(QualityCheck(name=config.mode, threshold=0, passed=False, detail=detail, remedy=remedy))
        groups = {f"class {name}": labels == label for label, name in enumerate(classes)} | dict(slices or {})
        groups = {name: mask & compared for name, mask in groups.items()}
        drop, drop_notes = check_drops(challenger, champion, groups, config)
        checks.append(drop)
        notes += drop_notes
        if left_out:
            note = f"{left_out:,} of {len(labels):,} test images were left out, since the champion was trained on them"
            if images:
                note += f"; the challenger has {challenger.correct[compared].mean():.2%} of the other images right"
            notes.append(note)
    if judged_before:
        notes.append(
            f"this test split has judged {judged_before:,} other version{'s' * (judged_before > 1)} of the model, each "
            f"with a probability of up to {config.alpha:.2g} that a worse one passes: replace its images from time "
            "to time"
        )
    if config.max_size_bytes is not None:
        checks.append(
            check_limit("size", "max_size_bytes", challenger.size_bytes, config.max_size_bytes, "bytes of weights")
        )
    if config.max_latency_ms is not None:
        checks.append(
            check_limit(
                "latency", "max_latency_ms", challenger.latency_ms, config.max_latency_ms, "ms for one image, median"
            )
        )
    return Verdict(
        challenger=challenger.address,
        champion=champion.address if champion else None,
        passed=all(check.passed for check in checks),
        images=len(labels),
        accuracy=challenger.accuracy,
        interval=challenger.interval,
        champion_accuracy=champion_accuracy,
        only_challenger=wins,
        only_champion=losses,
        p_value=p_value,
        checks=tuple(checks),
        notes=tuple(notes),
        dataset_version=dataset_version,
        test_sha256=test_sha256,
        left_out=left_out,
        changes=changes,
        judged_before=judged_before,
        config=config,
    )
