"""Runs the benchmarks and prints a table; see the package's docstring."""

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cnn.config import TrainConfig
from tests.bench.comparison import keep_memory
from tests.bench.training import compare_with_bare_loop


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each pair; the medians are shown")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every round's figures")
    options = parser.parse_args()

    keep_memory()
    table = Table(
        f"one thread, batch {TrainConfig().batch_size}, 28×28",
        "bare loop",
        "Convoy",
        "ratio: median",
        "min … max",
        box=None,
    )
    results = [compare_with_bare_loop(model, rounds=options.rounds) for model in ("notes", "convoy9")]
    for result in results:
        table.add_row(
            f"{result.name}: data, augmentation, lanes against one resident batch",
            f"{result.median(result.theirs):,.0f} img/s",
            f"{result.median(result.ours):,.0f} img/s",
            f"{result.median(result.ratios):.3f}",
            f"{min(result.ratios):.3f} … {max(result.ratios):.3f}",
        )
    Console(soft_wrap=True).print(table)
    if options.json:
        options.json.write_text(json.dumps([result.as_dict() for result in results], indent=2) + "\n")


if __name__ == "__main__":
    main()
