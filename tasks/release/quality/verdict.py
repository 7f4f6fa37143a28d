"""The verdict of the quality gate: its checks with numbers, and the sentences and tables that explain them."""

import hashlib

from infra.records import Record
from tasks.config.gates import GateConfig
from tasks.evaluation.binomial import CONFIDENCE
from tasks.evaluation.changes import Changes
from tasks.reporting.markdown import Markup, plain, table


class QualityCheck(Record):
    """One condition. `value` is None if nothing was measured."""

    name: str
    value: float | None = None
    threshold: float
    passed: bool
    detail: str
    """A sentence that says what was compared."""

    tested: bool = True
    """False if there was nothing to test, for example too few images; `passed` is then true, and `detail` says why."""

    untested: str = ""
    """What a check that was tested has left out, and why: for example the classes with too few images."""

    remedy: str = ""
    """What would make a failed check pass."""

    @property
    def outcome(self) -> str:
        """`passed`, `failed`, `not tested`, or `passed where tested` if a part was left out."""
        if not self.passed:
            return "failed"
        if not self.tested or self.value is None:  # older code stored checks without a value as passed
            return "not tested"
        return "passed where tested" if self.untested else "passed"

    @property
    def gap(self) -> str:
        """Name of the check with what of it was not tested, and why; empty if all of it was."""
        reason = self.detail if self.outcome == "not tested" else self.untested
        return f"{self.name} ({reason})" if reason else ""


class Verdict(Record):
    """The quality gate's decision, and its reasons."""

    challenger: str
    champion: str | None
    """`name/version`; None if there was none."""

    passed: bool
    images: int
    """In the test split."""

    accuracy: float
    interval: tuple[float, float]
    """Wilson's 95 % interval of the accuracy (1927)."""

    champion_accuracy: float | None
    """On the compared images; None without a champion, or if it cannot take the images."""

    only_challenger: int
    """Images that only the challenger has right."""

    only_champion: int
    p_value: float | None
    """McNemar's exact test (1947), one-sided: probability of at least this many wins if both are equally good."""

    checks: tuple[QualityCheck, ...]
    notes: tuple[str, ...]
    """Limits of the verdict."""

    dataset_version: str = ""
    """The dataset version of the test split."""

    test_sha256: str = ""
    """Digest of the test split, which several dataset versions may share; empty in verdicts of older code."""

    left_out: int = 0
    """Images that were not compared, since the champion was trained on them."""

    changes: Changes | None = None
    """Classes and images on which the versions differ; None without a comparison, or in verdicts of older code."""

    judged_before: int | None = None
    """Other versions of the model that this test split has judged before; None if they were not counted."""

    slices: tuple[str, ...] = ()
    """Columns of metadata whose values were judged too."""

    index_sha256: str = ""
    """The image index that these columns come from; empty without such columns."""

    champion_failed: bool = False
    """Whether the champion could not be loaded here, which may pass: then the version is judged again."""

    config: GateConfig

    @property
    def sha256(self) -> str:
        """Digest of the verdict's JSON."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """Returns the verdict as JSON."""
        return self.model_dump_json(indent=2).encode()

    @property
    def outcome(self) -> str:
        """`passed` or `refused`."""
        return "passed" if self.passed else "refused"

    @property
    def summary(self) -> str:
        """The decision, its reasons, and what was not tested, in one line."""
        head = f"{self.challenger} {self.accuracy:.2%}"
        against = f" against {self.champion}" if self.champion else ", no champion"
        if self.champion_accuracy is not None:
            against += f" {self.champion_accuracy:.2%}"
        parts = [f"{self.outcome}: {head}{against}", *self.reasons]
        if gaps := self.gaps:
            parts.append(f"not tested: {', '.join(gaps)}")
        return "; ".join(parts)

    @property
    def gain(self) -> float | None:
        """The accuracy minus the champion's, on the compared images; None if there was no comparison."""
        if self.champion_accuracy is None:
            return None
        return (self.only_challenger - self.only_champion) / (self.images - self.left_out)

    @property
    def reasons(self) -> list[str]:
        """The failed checks, each with its detail."""
        return [f"{check.name}: {check.detail}" for check in self.checks if not check.passed]

    @property
    def remedy(self) -> str:
        """What would make the failed checks pass, each once."""
        remedies = "; ".join(check.remedy for check in self.checks if not check.passed and check.remedy)
        return "; ".join(dict.fromkeys(remedies.split("; ")))

    @property
    def gaps(self) -> list[str]:
        """What was not tested, each with its reason."""
        return [check.gap for check in self.checks if check.gap]

    def explanation(self) -> list[tuple[str, str]]:
        """Returns what was compared, the difference, how sure it is and what would have to change, under headings.

        The sentences are for readers without statistics; they need only what every stored verdict has.
        """
        ours, images = self.challenger, self.images - self.left_out
        low, high = self.interval
        certainty = (
            f"on other images of the same kind, {ours} is very likely right in {low:.2%} to {high:.2%} of cases "
            f"({CONFIDENCE:.0%} confidence)"
        )
        gaps = list(self.gaps)
        if self.champion and self.champion_accuracy is not None:
            before = round(self.champion_accuracy * images)
            more = self.only_challenger - self.only_champion
            difference = f"{abs(more):,} {'more' if more > 0 else 'fewer'}" if more else "as many"
            what = f"{ours} and the champion, {self.champion}, on the same {images:,} test images"
            result = (
                f"{ours} has {before + more:,} right ({(before + more) / images:.2%}), {self.champion} {before:,} "
                f"({before / images:.2%}): {difference}. "
                f"Newly right are {self.only_challenger:,} images, newly wrong {self.only_champion:,}"
            )
            compared = (check.detail for check in self.checks if check.name == self.config.mode and check.passed)
            certainty += "".join(f". Against the champion: {detail}" for detail in compared)
        else:
            what = f"{ours} with the minimum requirements, on {self.images:,} test images"
            result = f"{ours} has {round(self.accuracy * self.images):,} right ({self.accuracy:.2%})"
            if not self.champion:
                gaps.append("whether it is better than a champion (there is none)")
        found = [("Compared", what), ("Result", result), ("How sure", certainty)]
        found += [("Refused because of", reason) for reason in self.reasons]
        if self.remedy:
            found.append(("What would help", self.remedy))
        if gaps:
            found.append(("Not tested", "; ".join(gaps)))
        return found

    def sentences(self, approval: str = "") -> list[str]:
        """Returns the decision and the explanation as lines of Markdown.

        Args:
            approval: a person's decision as a clause, if one was asked for.
        """
        said = [*([("Approval", approval)] if approval else []), *self.explanation()]
        return [
            f"**{'Passed' if self.passed else 'Refused'}**: {plain(self.challenger)} against "
            + plain(self.champion or "no champion"),
            "",
            *(f"- **{heading}**: {plain(text)}." for heading, text in said),
        ]

    def markdown(self, approval: str = "") -> str:
        """Returns the verdict as a page for MLflow and Prefect: first in sentences, then as tables.

        Args:
            approval: a person's decision as a clause, if one was asked for.
        """
        low, high = self.interval
        versions = [(self.challenger, f"{self.accuracy:.2%} ({low:.2%} to {high:.2%})", self.only_challenger)]
        if self.champion and self.champion_accuracy is not None:
            versions.append((self.champion, f"{self.champion_accuracy:.2%}", self.only_champion))
        lines = [
            *self.sentences(approval),
            "",
            *table(("", "accuracy", "right in this version only"), versions, "lrr"),
        ]
        basis = f"{self.images:,} test images"
        if self.dataset_version:
            basis += f", dataset version `{self.dataset_version[:12]}`"
        if self.p_value is not None:
            basis += f", McNemar exact p = {self.p_value:.3g} (one-sided)"
        checks = []
        for check in self.checks:
            value = "" if check.value is None else f"{check.value:.5g}"
            outcome = check.outcome if check.passed else Markup(f"**{check.outcome}**")
            detail = check.detail + (f"; not tested: {check.untested}" if check.untested else "")
            checks.append((check.name, value, f"{check.threshold:.5g}", outcome, detail))
        lines += ["", basis, "", *table(("check", "value", "threshold", "result", "detail"), checks, "lrrll")]
        return "\n".join([*lines, "", *(f"- {plain(note)}" for note in self.notes)]).rstrip() + "\n"
