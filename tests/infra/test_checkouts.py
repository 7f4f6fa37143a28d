"""Commits that a worker fetches to run their code."""

import subprocess
from pathlib import Path

import pytest

from infra.errors import UsageError
from infra.machine.checkouts import _fetch


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    done = subprocess.run(["git", "-C", str(folder), *identity, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_branch_that_was_deleted_is_not_found_in_an_old_copy(tmp_path: Path) -> None:
    repository, bare = tmp_path / "repository", tmp_path / "bare.git"
    repository.mkdir()
    git(repository, "init", "--quiet", "--initial-branch=main")
    for branch in ("main", "feature"):
        git(repository, "commit", "--quiet", "--allow-empty", "-m", branch)
        git(repository, "branch", "--force", "feature")
    commit = git(repository, "rev-parse", "feature")
    assert _fetch(bare, str(repository), commit[:10]) == commit  # servers give none by such a name: all are fetched
    git(repository, "branch", "--delete", "--force", "feature")
    with pytest.raises(UsageError, match="has no commit, branch or tag feature"):
        _fetch(bare, str(repository), "feature")
