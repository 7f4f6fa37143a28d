"""A contestant's process: writes its format, or reads two epochs and prints its figures as JSON.

python -m tests.bench.streaming.process write|read CONTESTANT DATA [CACHE]
"""

import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import torch

from infra.machine.lifeline import die_with_parent
from tests.bench.streaming.contestants import CONTESTANTS
from tests.bench.streaming.data import Data, upload

PERIOD = 1.0  # seconds between looks at the memory in use; a look takes time where much is mapped


class PeakMemory:
    """The most that this process and its children hold of their own, in MB; pages that they share are counted once.

    Anonymous and shared memory (`Pss_Anon` and `Pss_Shmem`, see proc_pid_smaps(5)); mapped files are left out, since
    the system takes their pages back whenever it needs them.
    """

    def __init__(self) -> None:
        self._peak, self._done = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> float:
        self._done.set()
        self._thread.join()
        return self._peak

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._done.wait(PERIOD):
            self._peak = max(self._peak, sum(_own(each.pid) for each in (me, *me.children(recursive=True))))


def _own(pid: int) -> float:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:  # it has just ended
        return 0.0
    fields = dict(line.split(":", 1) for line in text.splitlines()[1:])
    return sum(int(fields[name].split()[0]) for name in ("Pss_Anon", "Pss_Shmem")) * 1024 / 1e6


def write(name: str, data: Data) -> None:
    with tempfile.TemporaryDirectory(dir=data.folder) as folder:
        CONTESTANTS[name].write(data, Path(folder))
        upload(data, name, Path(folder))


def read(name: str, data: Data, cache: Path) -> dict[str, float]:
    """Images/s of the first epoch and of the second, and the peak of memory in MB.

    The first one's time includes opening the data; starting Python and importing the library count for neither.
    """
    import_library(name)
    memory, rates, counts = PeakMemory(), [], []
    began = time.perf_counter()
    epochs = CONTESTANTS[name].epochs(data, cache)
    for _ in range(2):
        count = 0
        for images, labels in next(epochs):
            assert images.dtype == torch.uint8 and images.shape[1:] == data.shape and len(images) == len(labels)
            count += len(images)
        now = time.perf_counter()
        rates.append(count / (now - began))
        counts.append(count)
        began = now
    if min(counts) < 0.5 * data.images:
        raise RuntimeError(f"{name} gave {counts} of {data.images} images")
    return {"cold": rates[0], "warm": rates[1], "memory": memory.stop()}


def import_library(name: str) -> None:
    __import__({"convoy": "cnn", "mosaicml": "streaming"}.get(name, name))


def main() -> None:
    die_with_parent(os.getppid())
    torch.set_num_threads(1)
    what, name, data = sys.argv[1], sys.argv[2], Data(**json.loads(sys.argv[3]))
    if what == "write":
        write(name, data)
    else:
        print(json.dumps(read(name, data, Path(sys.argv[4]))))


if __name__ == "__main__":
    main()
