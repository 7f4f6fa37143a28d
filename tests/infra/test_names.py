"""Names as MLflow reads them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.utils.search_utils import SearchModelVersionUtils, SearchUtils

from infra.tracking.names import filter_of, model_name_fault

TEXTS = st.text(st.sampled_from("ab '\"\\;-/*%`_=()#é花@&?!,.<>|\n")) | st.text(st.characters(codec="utf-8"))


@given(TEXTS)
def test_what_may_name_a_model_is_what_mlflow_reads_in_a_filter(name: str) -> None:
    if not model_name_fault(name):
        found = SearchModelVersionUtils.parse_search_filter(filter_of(name=name, run_id="f00d"))
        assert {each["key"]: each["value"] for each in found} == {"name": name, "run_id": "f00d"}
        (tag,) = SearchUtils.parse_search_filter(filter_of(**{"tags.convoy.model": name}))
        assert (tag["type"], tag["key"], tag["value"]) == ("tag", "convoy.model", name)


def test_one_of_several_values_may_be_asked_for() -> None:
    (found,) = SearchModelVersionUtils.parse_search_filter(filter_of(run_id=("f00d", "bob's")))
    assert (found["key"], found["comparator"], set(found["value"])) == ("run_id", "IN", {"f00d", "bob's"})


@pytest.mark.parametrize("name", ["cats@home", "@champion", " cats", "cats\u00a0"])
def test_a_name_by_which_no_command_finds_the_model_is_refused(name: str) -> None:
    assert model_name_fault(name)
