"""Reads the provenance of a run's code: commit, lock file, versions of the libraries that decide the result."""

import hashlib
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from infra.records import Record
from infra.tracking.tags import GIT_DIRTY, LIBRARY, LOCK_SHA256, SOURCE_COMMIT

COMMIT_VARIABLE = "CONVOY_COMMIT"
"""The environment variable that names the commit whose code a worker runs."""

LIBRARIES = ("torch", "torchvision", "mlflow", "prefect")
PACKAGE_FILE = Path(__file__).resolve().parents[1] / "__init__.py"
"""A file two levels below the root of Convoy's repository."""


class Provenance(Record):
    """Code and libraries: besides data and configuration, they must be equal for a run to give the same weights."""

    git_commit: str | None
    """Commit of the repository that contains the code; None if it was installed as a package."""

    git_dirty: bool | None
    """Whether files differ from that commit; None without a commit."""

    lock_sha256: str | None
    """SHA-256 of `requirements.lock`; None if there is no such file."""

    versions: dict[str, str]
    """Versions of Python and of the libraries."""

    def as_tags(self) -> dict[str, str]:
        """Returns tags of an MLflow run, without unknown values; MLflow's pages show the commit."""
        tags = {f"{LIBRARY}{name}": found for name, found in self.versions.items()}
        if self.git_commit is not None:
            tags[SOURCE_COMMIT] = self.git_commit
            tags[GIT_DIRTY] = str(self.git_dirty).lower()
        if self.lock_sha256 is not None:
            tags[LOCK_SHA256] = self.lock_sha256
        return tags


def provenance(code: Path = PACKAGE_FILE) -> Provenance:
    """Reads the environment, and the repository of `code`, a file two levels below the repository's root."""
    root = code.parent.parent
    changes: str | None = ""
    if not (commit := os.environ.get(COMMIT_VARIABLE)):  # with it, a worker runs the code of this commit
        # Installed code is often inside another project's repository, which does not track it.
        commit = _git(root, "rev-parse", "HEAD") if _git(root, "ls-files", "--error-unmatch", str(code)) else None
        changes = _git(root, "status", "--porcelain") if commit else None
    return Provenance(
        git_commit=commit,
        git_dirty=None if changes is None else changes != "",
        lock_sha256=lock_digest(code),
        versions={"python": platform.python_version()} | {name: _version(name) for name in LIBRARIES},
    )


def _git(root: Path, *arguments: str) -> str | None:
    """Returns git's output; None if git fails."""
    command = ["git", "-C", str(root), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def lock_digest(code: Path = PACKAGE_FILE) -> str | None:
    """Returns the SHA-256 of the lock file in the repository of `code`, as in `provenance`; None if there is none."""
    try:
        return hashlib.sha256((code.parent.parent / "requirements.lock").read_bytes()).hexdigest()
    except FileNotFoundError:
        return None


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "missing"
