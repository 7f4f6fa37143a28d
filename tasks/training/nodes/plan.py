"""Chooses which nodes train together, with how many ranks per node."""

from collections.abc import Mapping

from cnn.distributed.world_size import default_world_size


def plan(slots: Mapping[str, int], *, lanes: int, ranks: int | None, most_nodes: int | None) -> dict[str, int]:
    """Plans the largest world size that divides the lanes, on as few nodes as possible.

    Args:
        slots: ranks that each node can run; among equal nodes, earlier ones are preferred.
        lanes: of a global batch.
        ranks: largest world size; None for no limit but the slots.
        most_nodes: largest number of nodes; None for no limit.

    Returns:
        Ranks per chosen node; empty if there is no slot.
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
