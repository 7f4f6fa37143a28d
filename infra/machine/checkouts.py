"""Checks out commits of git repositories, and makes environments from their lock files, with git and uv.

<folder>/<repository>.git             a bare copy of the repository
<folder>/trees/<commit>               the files of a commit
<folder>/trees/<commit>.ready         is there once these are complete
<folder>/environments/<digest>        the packages of a lock file
<folder>/trees/<commit>.lock, …       held by each process that uses it; its time says when it was last used

git and uv take credentials for https and ssh from their usual places (credential helpers, `.netrc`, ssh keys).
"""

import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from infra.errors import Outage, UsageError, one_line, without_login
from infra.machine.locks import is_current, locked, try_locked
from infra.records import Record

UNUSED_SECONDS = 7 * 86_400.0  # after which a tree or an environment is removed
LOCK_FILES = ("uv.lock", "requirements.lock", "requirements.txt")
LONGEST_ERROR = 400  # characters
NAME = re.compile(r"[0-9A-Za-z][\w./-]*")
INDEX_AWAY = re.compile(
    r"error sending request|Request failed|network timeout|HTTP status (server|client) error \((5..|429|408)"
)
"""What uv says of a package index that does not answer, or is overloaded."""

OWN_FILES = re.compile(rb"^ *(-e|--editable|\.|/|file:)|@ *(file:|\.)|source = \{ (path|directory) =", re.MULTILINE)
"""Packages of a lock file that are files of the repository, and may change although the lock file does not."""

REFUSED = re.compile(
    r"does not appear to be a git repository|[Rr]epository .*not found|could not read Username"
    r"|Authentication failed|Permission denied|Host key verification failed|dubious ownership"
)
"""What git says if the address or the credentials are wrong, or it does not trust the repository or its host."""


class Checkout(Record):
    """The files of a commit, and the Python that has the packages of its lock file."""

    commit: str
    tree: Path
    python: Path


def check_address(repository: str) -> str:
    """Returns a repository's address.

    Raises:
        UsageError: it holds a password or a query, which would be visible to all, or is an option of git.
    """
    address = re.sub(r"^ssh://[^/:@]+@", "ssh://", repository)  # a user alone is no secret there
    if without_login(address) != address or re.match(r"https?://.*\?", address):
        raise UsageError(
            "the repository's address must hold no password and no query: git takes passwords from a credential helper"
        )
    if repository.startswith("-") or "::" in repository:
        raise UsageError(f"{repository} is no address of a git repository")
    return repository


def check_out(folder: Path, repository: str, ref: str) -> Checkout:
    """Makes the files of a commit and their environment, unless they exist; holds both until this process ends.

    What no process has used for `UNUSED_SECONDS` is removed.

    Args:
        folder: where everything is kept.
        repository: address or folder.
        ref: commit, branch or tag.

    Raises:
        UsageError: there is no such commit, or it has no lock file, or the lock file's packages cannot be installed.
        Outage: the repository or the package index cannot be reached.
    """
    if not NAME.fullmatch(ref):
        raise UsageError(f"{ref!r} is no commit, branch or tag")
    name = hashlib.sha256(check_address(repository).encode()).hexdigest()[:12]
    bare, trees, environments = folder / f"{name}.git", folder / "trees", folder / "environments"
    trees.mkdir(parents=True, exist_ok=True)
    environments.mkdir(exist_ok=True)
    with locked(folder / f"{name}.making"):
        commit = _fetch(bare, repository, ref)
        tree = trees / commit
        with _making(tree) as wanted:
            if wanted:
                _git(bare, "worktree", "prune")
                _git(bare, "worktree", "add", "--detach", "--force", str(tree), commit)
    lock = next((tree / each for each in LOCK_FILES if (tree / each).exists()), None)
    if lock is None:
        raise UsageError(f"commit {commit[:12]} has no lock file: {', '.join(LOCK_FILES)}")
    text = lock.read_bytes()
    own = commit if OWN_FILES.search(text) else ""
    digest = hashlib.sha256(f"{lock.name} {platform.python_version()}{own}\n".encode() + text).hexdigest()
    environment = environments / digest[:24]
    with _making(environment) as wanted:
        if wanted:
            _install(environment, lock, hashes=b"--hash=" in text)
    for each in (*trees.iterdir(), *environments.iterdir()):
        _remove_if_unused(each)
    return Checkout(commit=commit, tree=tree, python=environment / "bin" / "python")


def _fetch(bare: Path, repository: str, ref: str) -> str:
    """Fetches a commit, unless it is there; returns its full name."""
    _git(bare, "init", "--quiet", "--bare")  # also completes what was interrupted
    known = _git(bare, "rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}", must=False)
    if len(ref) == 40 and known == ref:
        return known
    address = os.path.abspath(repository) if os.path.isdir(repository) else repository
    found = "FETCH_HEAD"
    if _git(bare, "fetch", "--quiet", "--no-tags", address, ref, must=False) is None:
        # Some servers give no commit by its name.
        _git(bare, "fetch", "--quiet", "--prune", address, "+refs/heads/*:refs/heads/*")
        found = ref
    commit = _git(bare, "rev-parse", "--verify", "--quiet", f"{found}^{{commit}}", must=False)
    if not commit:
        raise UsageError(f"{without_login(repository)} has no commit, branch or tag {ref}")
    return commit


def _git(bare: Path, *arguments: str, must: bool = True) -> str | None:
    """Returns git's output; None if it fails, unless it must not.

    Raises:
        UsageError, Outage: it failed, and must not.
    """
    environment = os.environ | {"GIT_TERMINAL_PROMPT": "0", "GIT_DIR": str(bare)}
    command = ["git", "-c", "protocol.ext.allow=never", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise UsageError("code by commit needs the program git on the worker") from None
    if done.returncode == 0:
        return done.stdout.strip()
    if must:
        error = UsageError if REFUSED.search(done.stderr) else Outage
        raise error(f"git {arguments[0]} failed: {one_line(without_login(done.stderr))[-LONGEST_ERROR:]}")
    return None


def _install(environment: Path, lock: Path, *, hashes: bool) -> None:
    """Makes an environment of a lock file's packages, without the project itself."""
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if uv is None:
        raise UsageError("code by commit needs the program uv on the worker")
    # Compiled, since the image has processes write no bytecode: each one would take twice as long to start.
    variables = os.environ | {"UV_PROJECT_ENVIRONMENT": str(environment), "UV_COMPILE_BYTECODE": "1"}
    if lock.name == "uv.lock":
        project = ["--project", str(lock.parent), "--python", sys.executable]
        steps = [["sync", "--frozen", "--no-dev", "--no-install-project", *project]]
    else:
        checked = ["--require-hashes"] if hashes else []
        python = str(environment / "bin" / "python")
        install = ["pip", "install", "--python", python, *checked, "-r", str(lock)]
        steps = [["venv", "--python", sys.executable, str(environment)], install]
    for step in steps:
        _run([uv, *step], variables, lock)


def _run(command: list[str], variables: Mapping[str, str], lock: Path) -> None:
    # uv takes relative paths in a requirements file from the working folder.
    done = subprocess.run(
        command, capture_output=True, text=True, env=variables, stdin=subprocess.DEVNULL, cwd=lock.parent
    )
    if done.returncode:
        error = Outage if INDEX_AWAY.search(done.stderr) else UsageError
        raise error(f"the packages of {lock.name} cannot be installed: {one_line(done.stderr)[-LONGEST_ERROR:]}")


def _mark(path: Path) -> Path:
    """Returns the file that says that a tree or an environment is complete."""
    return path.with_name(f"{path.name}.ready")


def _lock(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


@contextmanager
def _making(path: Path) -> Iterator[bool]:
    """Holds a tree or an environment, and yields whether the block has to make it.

    Only one process makes it at a time, also if others have the same commit from another address.
    """
    with locked(path.with_name(f"{path.name}.making")):
        _hold(path)
        wanted = not (_mark(path).exists() and path.is_dir())
        if wanted:
            shutil.rmtree(path, ignore_errors=True)
        yield wanted
        _mark(path).touch()


def _hold(path: Path) -> None:
    """Marks a tree or an environment as in use, by this process and the program that it becomes by exec."""
    while True:
        descriptor = os.open(_lock(path), os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if is_current(_lock(path), descriptor):
            break
        os.close(descriptor)
    os.utime(descriptor)
    os.set_inheritable(descriptor, True)


def _remove_if_unused(path: Path) -> None:
    """Removes a tree or an environment; nothing if the path is another file."""
    lock = _lock(path)
    try:
        if time.time() - lock.stat().st_mtime < UNUSED_SECONDS:
            return
    except FileNotFoundError:
        return
    with try_locked(lock) as unused:
        if unused:
            _mark(path).unlink(missing_ok=True)  # first, so that what remains after a kill counts as incomplete
            shutil.rmtree(path, ignore_errors=True)
