"""Makes files in memory, through which processes of one machine can communicate when its disks are full."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def memory_file() -> Iterator[Path]:
    """Creates an empty file in memory that lives no longer than this process; yields its path.

    Processes of the same user can open the path. Nothing stays behind, however this process ends.
    """
    descriptor = os.memfd_create("convoy")
    try:
        yield Path(f"/proc/{os.getpid()}/fd/{descriptor}")
    finally:
        os.close(descriptor)
