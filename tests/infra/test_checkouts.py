"""Commits that a worker fetches to run their code."""

import subprocess
from pathlib import Path

import pytest

from infra.errors import UsageError, without_login
from infra.machine.checkouts import _fetch, check_address


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


@pytest.mark.parametrize(
    "address",
    [
        "https://token@host/x.git",
        "https://user:pa/ss@host/x.git",
        "ssh://git:secret@host/x.git",
        "git://user:secret@host/x.git",
        "https://host/x.git?private_token=secret",
    ],
)
def test_an_address_that_holds_a_secret_is_refused_without_repeating_it(address: str) -> None:
    with pytest.raises(UsageError, match="must hold no password and no query") as refused:
        check_address(address)
    assert address not in str(refused.value)


@pytest.mark.parametrize(
    "address",
    ["https://host:8443/team/x.git", "https://host/~a@b/x.git", "ssh://git@host:22/x", "git@host:team/x.git", "a?/x"],
)
def test_an_address_without_a_secret_is_taken(address: str) -> None:
    assert check_address(address) == address


@pytest.mark.parametrize(
    ("text", "shown"),
    {
        "https://user:pa/ss@host/x": "https://host/x",
        "cannot reach https://user:pa/ss@host/x or http://a:b@c/": "cannot reach https://host/x or http://c/",
        "http://host:80/a@b and http://[::1]:80/a@b": "http://host:80/a@b and http://[::1]:80/a@b",
    }.items(),
)
def test_passwords_are_not_shown(text: str, shown: str) -> None:
    assert without_login(text) == shown
