"""Two things measured in turns."""

import ctypes
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Rates of two things, round by round; higher is better."""

    name: str
    ours: tuple[float, ...]
    theirs: tuple[float, ...]

    @property
    def ratios(self) -> tuple[float, ...]:
        """Ours by theirs, each round."""
        return tuple(a / b for a, b in zip(self.ours, self.theirs, strict=True))

    @staticmethod
    def median(values: Sequence[float]) -> float:
        return statistics.median(values)

    def as_dict(self) -> dict[str, object]:
        return asdict(self) | {"ratios": self.ratios}


def keep_memory() -> None:
    """Have the C library keep freed memory, so that page faults slow neither side.

    Otherwise they slow whichever side allocates the larger blocks: the bare loop, by up to a third.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    libc = ctypes.CDLL(None)
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, 2**31 - 1)


def compare(
    name: str, ours: Callable[[], None], theirs: Callable[[], None], *, amount: float, calls: int, rounds: int
) -> Comparison:
    """Call each `calls` times a round, after a warm-up, changing who is first; `amount` is what one call does."""
    rates: dict[Callable[[], None], list[float]] = {ours: [], theirs: []}
    for work in rates:
        for _ in range(3):
            work()
    for number in range(rounds):
        for work in (ours, theirs) if number % 2 else (theirs, ours):
            began = time.perf_counter()
            for _ in range(calls):
                work()
            rates[work].append(amount * calls / (time.perf_counter() - began))
    return Comparison(name=name, ours=tuple(rates[ours]), theirs=tuple(rates[theirs]))
