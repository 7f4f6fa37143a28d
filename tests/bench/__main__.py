"""Runs the benchmarks and prints a table; see the package's docstring."""

import argparse
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from infra.machine.lifeline import adopt_orphans, end_descendants
from tasks.upkeep.environment import describe
from tests.bench import (
    checkpoints,
    frameworks,
    gpu,
    index,
    label_errors,
    loaders,
    memory,
    overhead,
    photos,
    prediction,
    record,
    scaling,
    training,
)
from tests.bench.comparison import Comparison, LeftOut, keep_memory
from tests.bench.streaming import IMAGES, LEAST, streaming

Measure = Callable[[int], Iterator[Comparison]]

COMPARISONS: dict[str, Measure] = {
    "bare": training.bare_loop,
    "lanes": training.plain_ddp,
    "ranks": training.two_threads,
    "lightning": frameworks.lightning,
    "dataloader": frameworks.dataloader,
    "accelerate": frameworks.accelerate,
    "loader28": loaders.small_images,
    "loader224": loaders.large_images,
    "memory": memory.memory,
    "index": index.index,
    "checkpoints": checkpoints.checkpoints,
    "exchange": scaling.exchange,
    "streaming": streaming,
    "overhead": overhead.overhead,
    "photos": photos.photos,
    "errors": label_errors.label_errors,
    "gpu": gpu.gpu,
    "predict": prediction.prediction,
    "record": record.record,
}
WIDTH = 140  # of the table, wherever it is printed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="comparisons to run; all, if none is named")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each pair; the medians are shown")
    parser.add_argument("--images", type=_numbers, default=IMAGES, help="for streaming: how many; 10000,1000000")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="for photos: train, validation and test folders")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every round's figures")
    parser.add_argument("--list", action="store_true", help="say what there is to compare")
    options = parser.parse_args()
    if options.list:
        for name, comparison in COMPARISONS.items():
            print(f"{name:12}{(comparison.__doc__ or '').splitlines()[0]}")
        return 0
    if unknown := [name for name in options.names if name not in COMPARISONS]:
        parser.error(f"no comparison is named {unknown[0]!r}; there are {', '.join(COMPARISONS)}")
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    if min(options.images) < LEAST:
        parser.error(f"--images must be at least {LEAST}")

    adopt_orphans()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that ranks are ended and folders removed
    try:
        chosen = {name: COMPARISONS[name] for name in options.names or COMPARISONS}
        if streaming in chosen.values():
            chosen["streaming"] = partial(streaming, images=options.images)
        if photos.photos in chosen.values():
            chosen["photos"] = partial(photos.photos, data=options.data)
        return run(chosen, options.rounds, options.json)
    finally:
        end_descendants(5.0)


def run(comparisons: dict[str, Measure], rounds: int, file: Path | None) -> int:
    """Run comparisons, print the table and write the report; returns the exit status."""
    keep_memory()
    say = Console(width=WIDTH, highlight=False)
    machine = describe() | {"processor": _processor()}
    results: list[Comparison] = []
    left_out: dict[str, str] = {}
    failed = False
    for name, comparison in comparisons.items():
        began = time.perf_counter()
        load = os.getloadavg()[0]
        try:
            for result in comparison(rounds):
                results.append(result)
                ratio = statistics.median(result.ratios)
                print(f"{result.name}: {ratio:.3f} times {result.theirs_label}", file=sys.stderr)
        except LeftOut as missing:
            left_out[name] = str(missing)
        except Exception as error:  # the others are worth having all the same
            left_out[name] = f"failed: {type(error).__name__}: {error}"
            failed = True
        print(f"{name}: {time.perf_counter() - began:.0f} s, load average before it {load:.1f}", file=sys.stderr)

    say.print(f"{machine['processor']}, {machine['cpu']}; torch {machine['torch']}; {rounds} rounds")
    say.print(_table(results))
    for name, reason in left_out.items():
        say.print(f"{name}: {reason}")
    if file:
        report = {"machine": machine, "comparisons": [each.as_dict() for each in results], "left_out": left_out}
        file.write_text(json.dumps(report, indent=2) + "\n")
    return int(failed)


def _table(results: list[Comparison]) -> Table:
    table = Table("comparison", "ours", "theirs", "ratio: median", "min … max", box=None)
    for result in results:
        table.add_row(
            result.name,
            f"{result.ours_label}: {_figure(result.ours)} {result.unit}",
            f"{result.theirs_label}: {_figure(result.theirs)} {result.unit}",
            f"{statistics.median(result.ratios):.3f}",
            f"{min(result.ratios):.3f} … {max(result.ratios):.3f}",
        )
    return table


def _figure(figures: Sequence[float]) -> str:
    median = statistics.median(figures)
    return f"{median:,.0f}" if median >= 100 else f"{median:.1f}"


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def _processor() -> str:
    """The model's name, as Linux has it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "unknown processor")


if __name__ == "__main__":
    sys.exit(main())
