"""The provenance of code in real git repositories."""

import hashlib
import subprocess
from pathlib import Path

import pytest

from infra.tracking.provenance import provenance


def git(folder: Path, *arguments: str) -> str:
    identity = (
        "-c",
        "user.name=Somebody",
        "-c",
        "user.email=somebody@example.org",
        "-c",
        "commit.gpgsign=false",
    )
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """Creates a file two levels below the root of a repository with a lock file."""
    file = tmp_path / "infra" / "provenance.py"
    file.parent.mkdir()
    file.write_text("code\n")
    (tmp_path / "requirements.lock").write_text("torch==2\n")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    return file


def test_clean_repository_is_named_by_its_commit(code: Path, tmp_path: Path) -> None:
    found = provenance(code)
    assert found.git_commit == git(tmp_path, "rev-parse", "HEAD")
    assert found.git_dirty is False
    assert found.lock_sha256 == hashlib.sha256(b"torch==2\n").hexdigest()
    assert found.as_tags()["mlflow.source.git.commit"] == found.git_commit


def test_changed_file_makes_the_commit_dirty(code: Path) -> None:
    code.write_text("other code\n")
    assert provenance(code).git_dirty is True


def test_code_installed_inside_another_repository_has_no_commit(code: Path, tmp_path: Path) -> None:
    installed = tmp_path / "environment" / "infra" / "provenance.py"
    installed.parent.mkdir(parents=True)
    installed.write_text("code\n")
    found = provenance(installed)
    assert (found.git_commit, found.git_dirty, found.lock_sha256) == (None, None, None)
    assert "mlflow.source.git.commit" not in found.as_tags()


def test_versions_are_those_that_are_installed() -> None:
    versions = provenance().versions
    assert versions["python"].startswith("3.")
    assert {"torch", "torchvision", "mlflow", "prefect"} <= set(versions)
    assert "missing" not in versions.values()
