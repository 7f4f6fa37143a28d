"""The choice of nodes that train together."""

import pytest

from tasks.training.nodes.plan import plan


@pytest.mark.parametrize(
    ("slots", "limits", "chosen"),
    [
        ({}, {}, {}),
        ({"a": 1}, {}, {"a": 1}),
        ({"a": 1, "b": 1}, {}, {"a": 1, "b": 1}),
        ({"a": 1, "b": 1, "c": 1}, {}, {"a": 1, "b": 1}),  # three ranks do not share four lanes
        ({"a": 1, "b": 2, "c": 1}, {}, {"b": 2, "a": 1, "c": 1}),
        ({"a": 1, "b": 8}, {}, {"b": 4}),  # as few nodes as can hold it
        ({"a": 2, "b": 2}, {"ranks": 2}, {"a": 2}),
        ({"a": 2, "b": 2}, {"ranks": 3}, {"a": 2}),
        ({"a": 2, "b": 2, "c": 3}, {"most_nodes": 1}, {"c": 2}),
    ],
)
def test_largest_world_size_on_fewest_nodes(
    slots: dict[str, int], limits: dict[str, int], chosen: dict[str, int]
) -> None:
    found = plan(slots, lanes=4, ranks=limits.get("ranks"), most_nodes=limits.get("most_nodes"))
    assert found == chosen
    assert list(found) == list(chosen)  # the first leads
