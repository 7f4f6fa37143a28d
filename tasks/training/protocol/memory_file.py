"""Makes files in memory, by which processes of one machine can tell each other something when its disks are full."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def memory_file() -> Iterator[Path]:
    """Makes an empty file that is on no disk and ends with this process; yields its path.

    Processes of the same user can open the path, and nothing of it is left behind, however this process ends.
    """
    descriptor = os.memfd_create("convoy")
    try:
        yield Path(f"/proc/{os.getpid()}/fd/{descriptor}")
    finally:
        os.close(descriptor)
