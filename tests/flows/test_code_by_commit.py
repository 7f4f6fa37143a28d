"""Flow runs with the code of a commit: of Convoy's own repository, and of a team's project."""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from infra.errors import Outage, UsageError
from infra.machine import checkouts
from infra.machine.checkouts import check_address, check_out
from tests.flows.conftest import Convoy
from tests.flows.program import Program
from tests.flows.test_resumption import deployed, run_of, start_worker
from tests.flows.test_wheel import built_wheel
from tests.infra.wheels import make_wheel
from tests.own_project import EXAMPLE, write

__all__ = ["deployed", "start_worker"]

ROOT = Path(__file__).parents[2]


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=Ann", "-c", "user.email=ann@example.org")
    done = subprocess.run(["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A bare repository whose commits pin one small package, and the working tree that pushes to it."""
    bare, work = tmp_path / "project.git", tmp_path / "work"
    subprocess.run(["git", "init", "--quiet", "--bare", "--initial-branch=main", str(bare)], check=True)
    subprocess.run(["git", "clone", "--quiet", str(bare), str(work)], check=True, capture_output=True)
    (work / "requirements.txt").write_text("iniconfig==2.1.0\n")
    (work / "net.py").write_text("WIDTH = 1\n")
    git(work, "add", ".")
    git(work, "commit", "--quiet", "-m", "first")
    git(work, "push", "--quiet", "origin", "HEAD:main")
    return bare


def pushed(repository: Path, text: str) -> str:
    """Pushes a changed file to main; returns the commit."""
    work = repository.parent / "work"
    (work / "net.py").write_text(text)
    git(work, "commit", "--quiet", "-a", "-m", text)
    git(work, "push", "--quiet", "origin", "HEAD:main")
    return git(work, "rev-parse", "HEAD")


def test_a_commit_or_branch_is_checked_out_with_the_packages_of_its_lock_file(repository: Path, tmp_path: Path) -> None:
    first = git(repository, "rev-parse", "main")
    found = check_out(tmp_path / "code", str(repository), "main")
    assert (found.commit, (found.tree / "net.py").read_text()) == (first, "WIDTH = 1\n")
    installed = [found.python, "-c", "import importlib.metadata as m; print(m.version('iniconfig'))"]
    assert subprocess.run(installed, check=True, capture_output=True, text=True).stdout == "2.1.0\n"
    assert list(found.python.parents[1].glob("lib/*/site-packages/iniconfig/__pycache__/*.pyc"))  # compiled

    second = pushed(repository, "WIDTH = 2\n")
    again, earlier = (check_out(tmp_path / "code", str(repository), ref) for ref in ("main", first))
    assert (again.commit, (again.tree / "net.py").read_text()) == (second, "WIDTH = 2\n")
    assert earlier == found
    assert again.python == found.python  # the lock file is the same


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"PATH": "/nowhere"}, "needs the program git"),
        ({"GIT_TEST_ASSUME_DIFFERENT_OWNER": "1"}, "safe.directory"),  # as of a mounted repository
    ],
)
def test_what_no_time_mends_is_no_outage(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], said: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=said):
        check_out(tmp_path / "code", str(repository), "main")


@pytest.mark.long
def test_a_repository_of_another_user_is_taken_if_git_trusts_it(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gitconfig").write_text(f"[safe]\ndirectory = {repository}\n")
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    assert check_out(tmp_path / "code", str(repository), "main").commit


@pytest.mark.long
def test_a_lock_file_may_name_a_wheel_of_the_repository(repository: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    (work / "requirements.txt").write_text("./wheels/nets-0.1.0-py3-none-any.whl\n")
    for width in (3, 4):
        make_wheel(work / "wheels", "nets", {"nets.py": f"WIDTH = {width}\n".encode()})
        git(work, "add", ".")
        pushed(repository, f"WIDTH = 1{width}\n")
        python = check_out(tmp_path / "code", str(repository), "main").python
        program = [python, "-c", "import nets; print(nets.WIDTH)"]
        assert subprocess.run(program, check=True, capture_output=True, text=True).stdout == f"{width}\n"


def test_what_nothing_uses_is_removed(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys, pathlib, infra.machine.checkouts as c; c.check_out(pathlib.Path(sys.argv[1]), *sys.argv[2:])"
    command = [sys.executable, "-c", code, str(tmp_path / "code"), str(repository), "main"]
    subprocess.run(command, check=True, cwd=ROOT)  # when it has ended, nothing is held
    (old,) = [each for each in (tmp_path / "code" / "trees").iterdir() if each.is_dir()]
    monkeypatch.setattr(checkouts, "UNUSED_SECONDS", -1.0)
    pushed(repository, "WIDTH = 2\n")
    new = check_out(tmp_path / "code", str(repository), "main")
    assert new.tree.exists()
    assert new.python.exists()
    assert not old.exists()


def test_what_a_kill_has_left_unfinished_is_made_anew(repository: Path, tmp_path: Path) -> None:
    """As after a power cut during `git worktree add`, or during the removal of an environment."""
    first = check_out(tmp_path / "code", str(repository), "main")
    for path in (first.tree, first.python.parents[1]):
        path.with_name(f"{path.name}.ready").unlink()
    (first.tree / "net.py").unlink()
    first.python.unlink()
    (bare,) = (tmp_path / "code").glob("*.git")
    (bare / "HEAD").unlink()  # the full disk of `git init`
    again = check_out(tmp_path / "code", str(repository), "main")
    assert again == first
    assert (again.tree / "net.py").exists()
    shutil.rmtree(again.tree)  # as a person may do
    again = check_out(tmp_path / "code", str(repository), "main")
    assert (again.tree / "net.py").read_text() == "WIDTH = 1\n"
    assert again.python.exists()


def test_mistakes_and_outages_are_one_line(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"has no commit, branch or tag v7$"):
        check_out(tmp_path / "code", str(repository), "v7")
    with pytest.raises(UsageError, match="is no commit, branch or tag"):
        check_out(tmp_path / "code", str(repository), "--upload-pack=touch x")
    with pytest.raises(UsageError, match="does not appear to be a git repository"):
        check_out(tmp_path / "code", str(tmp_path / "none.git"), "main")
    with pytest.raises(Outage, match="git fetch failed"):
        check_out(tmp_path / "code", "http://127.0.0.1:9/team/project.git", "main")
    for address in ("https://ann:secret@example.org/x.git", "ext::sh -c touch% x", "--upload-pack=x"):
        with pytest.raises(UsageError) as raised:
            check_address(address)
        assert "secret" not in str(raised.value)
    assert check_address("git@example.org:team/x.git") == "git@example.org:team/x.git"

    variables = {"UV_DEFAULT_INDEX": "http://127.0.0.1:9/simple", "UV_NO_CACHE": "1", "UV_HTTP_RETRIES": "0"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Outage, match=r"the packages of requirements.txt cannot be installed: .*iniconfig"):
        check_out(tmp_path / "no-index", str(repository), "main")
    for name in variables:
        monkeypatch.delenv(name)
    work = repository.parent / "work"
    (work / "requirements.txt").write_text("iniconfig==99.1\n")
    git(work, "commit", "--quiet", "-a", "-m", "no such version")
    git(work, "push", "--quiet", "origin", "HEAD:main")
    with pytest.raises(UsageError, match=r"the packages of requirements.txt cannot be installed: .*99\.1"):
        check_out(tmp_path / "code", str(repository), "main")

    git(work, "rm", "--quiet", "requirements.txt")
    git(work, "commit", "--quiet", "-m", "none")
    git(work, "push", "--quiet", "origin", "HEAD:main")
    with pytest.raises(UsageError, match=r"has no lock file: uv.lock, requirements.lock, requirements.txt$"):
        check_out(tmp_path / "code", str(repository), "main")


def test_a_password_in_an_address_is_refused_and_not_repeated(convoy: Convoy) -> None:
    done = convoy("retrain", "--commit", "main", "--repository", "https://ann:secret@example.org/x.git")
    assert (done.status, "must hold no password" in done.complaint) == (2, True)
    assert "secret" not in done.stdout + done.stderr


def pushed_copy(folder: Path, changes: int) -> tuple[Path, list[str]]:
    """Copies this repository, and pushes changes of a network that decide no bit, but belong to the code.

    Returns:
        The bare repository; its commit before, and that of each change.
    """
    bare, work = folder / "convoy.git", folder / "work"
    subprocess.run(["git", "clone", "--quiet", "--bare", str(ROOT), str(bare)], check=True)
    subprocess.run(["git", "clone", "--quiet", str(bare), str(work)], check=True, capture_output=True)
    file = work / "cnn" / "networks" / "convoy9.py"
    commits = [git(work, "rev-parse", "HEAD")]
    for number in range(changes):
        file.write_text(f"{file.read_text()}\nPUSHED_{number} = True\n")
        git(work, "commit", "--quiet", "-a", "-m", "another network")
        commits.append(git(work, "rev-parse", "HEAD"))
    git(work, "push", "--quiet", "origin", "HEAD:refs/heads/pushed")  # HEAD may be detached, as CI checks it out
    return bare, commits


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_pushed_change_of_a_network_is_trained_with_and_a_wrong_commit_fails(
    deployed: Callable[..., str],
    start_worker: Callable[[], "subprocess.Popen[bytes]"],
    program: Callable[..., Program],
    convoy: Convoy,
    tmp_path: Path,
) -> None:
    bare, (before, commit) = pushed_copy(tmp_path, 1)
    name = deployed("by-commit", epochs=2)
    start_worker()

    def retrain(ref: str) -> tuple[int, dict[str, str]]:
        options = ("--commit", ref, "--repository", str(bare), "--wait", "--json")
        done = program("retrain", "-d", name, *options).wait(300)
        return done.status, json.loads(done.stdout)

    status, first = retrain(before)
    assert (status, first["commit"], first["status"]) == (0, before, "done")
    status, again = retrain(before)
    assert (status, again["status"]) == (0, "unchanged")
    status, second = retrain(commit)
    assert (status, second["commit"]) == (0, commit), second
    assert "code" in second["reason"]
    runs = [MlflowClient().get_run(each["mlflow_run_id"]).data.tags for each in (first, second)]
    assert [tags["mlflow.source.git.commit"] for tags in runs] == [before, commit]
    assert runs[0]["convoy.code_digest"] != runs[1]["convoy.code_digest"]
    assert run_of(second["prefect_flow_run_id"]).labels["convoy.commit"] == commit

    status, wrong = retrain("no-such-branch")
    assert (status, wrong["error"]) == (1, f"the code: {bare} has no commit, branch or tag no-such-branch")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_teams_project_trains_its_own_network_with_the_convoy_of_its_lock_file(
    repository: Path,
    deployed: Callable[..., str],
    start_worker: Callable[[], "subprocess.Popen[bytes]"],
    program: Callable[..., Program],
    tmp_path: Path,
) -> None:
    wheel, work = built_wheel(tmp_path), repository.parent / "work"
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    locked = (ROOT / "requirements.lock").read_text() + f"convoy-cnn @ {wheel.as_uri()} --hash=sha256:{digest}\n"
    write(work, {"nets/small.py": EXAMPLE, "requirements.txt": locked})
    git(work, "add", ".")
    git(work, "commit", "--quiet", "-m", "a network")
    git(work, "push", "--quiet", "origin", "HEAD:main")
    name = deployed("team", model="nets.small:Small", epochs=2)
    start_worker()  # in a folder without the network

    def retrain() -> dict[str, str]:
        options = ("--commit", "main", "--repository", str(repository), "--wait", "--json")
        done = program("retrain", "-d", name, *options).wait(300)
        assert done.status in (0, 3), done.stderr  # of two poor versions the gate may refuse the second
        return json.loads(done.stdout)  # type: ignore[no-any-return]

    first = retrain()
    assert (first["status"], first["commit"]) == ("done", git(work, "rev-parse", "HEAD"))
    write(work, {"nets/small.py": EXAMPLE.replace("ReLU", "SiLU")})
    git(work, "commit", "--quiet", "-a", "-m", "another activation")
    git(work, "push", "--quiet", "origin", "HEAD:main")
    again = retrain()
    assert (again["commit"], "code (nets/small.py)" in again["reason"]) == (git(work, "rev-parse", "HEAD"), True)
    assert again["weights_sha256"] != first["weights_sha256"]
