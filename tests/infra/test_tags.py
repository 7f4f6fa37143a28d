"""Tags of registered versions as typed records."""

from datetime import UTC, datetime

import pytest

from infra.errors import UsageError
from infra.tracking.model_registry import RegisteredVersion
from infra.tracking.tags import SERVING, VersionRecord


def test_a_record_and_its_tags_say_the_same() -> None:
    record = VersionRecord(dataset="digits", flow_run="1234", serving="passed", verdict_champion="digits/1")
    tags = record.to_tags()
    assert tags == {
        "convoy.dataset": "digits",
        "prefect.flow_run_id": "1234",
        SERVING: "passed",
        "convoy.verdict_champion": "digits/1",
    }
    assert VersionRecord.from_tags(tags) == record


def test_what_others_have_tagged_is_passed_over_and_what_is_missing_is_named() -> None:
    version = RegisteredVersion(
        name="theirs",
        version="3",
        run_id="",
        created=datetime.now(UTC),
        description="",
        tags={"verdict": "passed", SERVING: "failed"},
    )
    assert version.record == VersionRecord(serving="failed")
    with pytest.raises(UsageError, match="models:/theirs/3 has no tag convoy"):
        version.required("dataset_version")


@pytest.mark.parametrize(
    ("tag", "accuracy"), [("0.875", 0.875), ("1.0", 1.0), ("good", None), ("nan", None), ("", None), (None, None)]
)
def test_an_accuracy_that_a_person_has_changed_counts_as_unknown(tag: str | None, accuracy: float | None) -> None:
    assert VersionRecord(test_accuracy=tag).accuracy == accuracy
