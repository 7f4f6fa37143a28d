"""Checks and chooses the number of ranks that share the lanes of a batch."""

from cnn.errors import InputError


def check_world_size(lanes: int, world_size: int) -> None:
    """Raises InputError, which names the nearest possible world sizes, unless ranks can share the lanes equally."""
    if lanes % world_size == 0:
        return
    fitting = [size for size in range(1, lanes + 1) if lanes % size == 0]
    lower = max(size for size in fitting if size < world_size)
    higher = min((size for size in fitting if size > world_size), default=None)
    nearest = f"nearest is {lower}" if higher is None else f"nearest are {lower} and {higher}"
    raise InputError(f"{world_size} ranks cannot share {lanes} lanes equally; the {nearest} (set ranks or lanes)")


def default_world_size(lanes: int, devices: int) -> int:
    """Returns the largest number of ranks that can share the lanes equally and have a device each."""
    return max(size for size in range(1, max(1, min(lanes, devices)) + 1) if lanes % size == 0)
