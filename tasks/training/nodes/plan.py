"""Which nodes train together, with how many ranks each."""

from collections.abc import Mapping

from cnn.distributed.world_size import default_world_size


def plan(slots: Mapping[str, int], *, lanes: int, ranks: int | None, most_nodes: int | None) -> dict[str, int]:
    """Choose nodes and ranks for the largest world size that divides the lanes, on as few nodes as can hold it.

    Args:
        slots: ranks that each node can run; of nodes with equally many, the earlier ones are preferred.
        lanes: of the training.
        ranks: the world size at most; None for as many as there are slots.
        most_nodes: nodes at most.

    Returns:
        Ranks of each chosen node; empty without a slot.
    """
    largest = sorted(slots, key=lambda node: -slots[node])[:most_nodes]
    available = sum(slots[node] for node in largest)
    if not available:
        return {}
    left = default_world_size(lanes, min(available, ranks or available))
    chosen: dict[str, int] = {}
    for node in largest:
        if not left:
            break
        chosen[node] = min(slots[node], left)
        left -= chosen[node]
    return chosen
