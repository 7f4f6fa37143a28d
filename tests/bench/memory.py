"""Memory of a rank, as images become many.

    python -m tests.bench.memory FOLDER    trains on the packed images there, and prints the peak in MB

It is anonymous memory (`RssAnon`, see proc_pid_status(5)): what the rank needs for itself. The pages of the mapped
shards are left out; all ranks share them, and the system takes them back whenever it needs them.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from cnn.distributed.process_group import make_deterministic, process_group
from cnn.training.trainer import Trainer
from infra.machine.lifeline import die_with_parent
from tests.bench.comparison import Comparison, Side, compare
from tests.bench.data import open_packed, packed_images
from tests.bench.rank_program import train_step
from tests.bench.turns import Job

MANY, FEW = 1_000_000, 100_000
STEPS = 200
PERIOD = 0.01  # seconds between looks at the memory in use


def memory(_: int) -> Iterator[Comparison]:
    """Peak memory of a rank, without shared file pages, on 1 000 000 and on 100 000 images: 200 steps of `notes`.

    Figures are MB, PyTorch's own included; lower is better. There is one round, whatever is asked for: rounds
    hardly differ.
    """
    with packed_images(MANY) as many, packed_images(FEW) as few:
        sides = [Side(f"{count:,} images", lambda f=folder: _peak(f)) for count, folder in ((MANY, many), (FEW, few))]
        yield compare("memory: notes", *sides, rounds=1, unit="MB", warm_up=False)


def _peak(folder: Path) -> float:
    command = [sys.executable, "-m", "tests.bench.memory", str(folder)]
    return float(subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True).stdout)


def main() -> None:
    die_with_parent(os.getppid())
    make_deterministic()
    manifest, train = open_packed(Path(sys.argv[1]))
    config = Job(program="convoy", model="notes").config
    peak, done = 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(PERIOD):
            peak = max(peak, _anonymous())

    with process_group() as (device, exchange):
        watcher = threading.Thread(target=watch)
        watcher.start()
        trainer = Trainer(
            config, manifest=manifest, train_split=train, val_split=train, device=device, exchange=exchange
        )
        for _ in range(STEPS):
            train_step(trainer)
        done.set()
        watcher.join()
    print(peak)


def _anonymous() -> float:
    """MB in use now."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024 / 1e6


if __name__ == "__main__":
    main()
