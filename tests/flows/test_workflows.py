"""GitHub's workflows and the scripts that they call, checked without GitHub."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.flows.test_resumption import deployed, run_of
from tests.linters import program

__all__ = ["deployed"]

REPOSITORY = Path(__file__).parents[2]
WORKFLOWS = sorted((REPOSITORY / ".github" / "workflows").glob("*.yml"))
ACTION = REPOSITORY / ".github" / "actions" / "retrain"
SCRIPTS = [*sorted((REPOSITORY / ".github").glob("*.sh")), ACTION / "convoy", REPOSITORY / ".ci" / "run"]
SCRIPT = REPOSITORY / ".github" / "retrain.sh"
NEWEST = REPOSITORY / ".github" / "newest.sh"

CONVOY = """#!/usr/bin/env bash
printf '%s\\n' "$@" >arguments
while (($#)); do
  if [[ $1 == --report && -z "${NO_REPORT:-}" ]]; then printf '### a report\\n' >"$2"; fi
  shift
done
echo '{"status": "whatever"}'
exit "$STATUS"
"""
"""Replaces the command: records its arguments, and ends with a given status."""

GH = """#!/usr/bin/env bash
echo "$*" >>calls
case "$*" in *--paginate*) if [[ -n "${COMMENT:-}" ]]; then echo "$COMMENT"; fi ;; esac
exit "${GH_STATUS:-0}"
"""
"""Replaces GitHub's command line; COMMENT is the id of the existing comment."""


MAKE = """#!/usr/bin/env bash
echo "$*" >>calls
case $1 in
  lock) printf 'kept==1.0 \\\\\\n    --hash=x\\nmoved==2.0 \\\\\\nnew==0.1 \\\\\\n' >requirements.lock ;;
  test) printf 'much\\nFAILED tests/a.py::test_b - assert 1\\nmore\\n' ;;
esac
[[ $1 != "$BREAKS" ]]
"""
"""Replaces make: resolves to other versions, and one of its targets fails."""


def steps() -> Iterator[dict[str, Any]]:
    for file in WORKFLOWS:
        for job in yaml.safe_load(file.read_text())["jobs"].values():
            yield from job["steps"]
    yield from yaml.safe_load((ACTION / "action.yml").read_text())["runs"]["steps"]


def test_actionlint_finds_nothing() -> None:
    done = subprocess.run([program("actionlint"), *map(str, WORKFLOWS)], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_each_script_is_sound(script: Path) -> None:
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_shellcheck_finds_nothing() -> None:
    done = subprocess.run([program("shellcheck"), *map(str, SCRIPTS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_actions_are_pinned_by_commit_with_the_version_beside() -> None:
    files = [*WORKFLOWS, ACTION / "action.yml"]
    lines = [line for file in files for line in file.read_text().splitlines() if re.match(r" +(- )?uses:", line)]
    assert lines
    for line in lines:
        if "uses: ./" in line:
            assert (REPOSITORY / line.partition("./")[2] / "action.yml").exists()
            continue
        assert re.search(r"uses: [\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$", line), line


def test_workflows_may_nothing_but_what_a_job_asks_for() -> None:
    for file in WORKFLOWS:
        workflow = yaml.safe_load(file.read_text())
        assert workflow["permissions"] == {}
        for job in workflow["jobs"].values():
            assert job["permissions"]["contents"] == "read"
            assert job["timeout-minutes"]


def test_nothing_from_outside_is_pasted_into_a_script() -> None:
    for step in steps():
        assert "${{" not in step.get("run", "")


def test_checkouts_leave_no_token_behind() -> None:
    checkouts = [step for step in steps() if step.get("uses", "").startswith("actions/checkout@")]
    assert checkouts
    assert all(step["with"]["persist-credentials"] is False for step in checkouts)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder with the replacements in `bin`."""
    (tmp_path / "bin").mkdir()
    for name, text in (("convoy", CONVOY), ("gh", GH)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def run(folder: Path, status: int, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Runs the script, in which `convoy` ends with a given status."""
    servers = ("PREFECT_API_URL",)
    variables = {
        **{name: "https://server.example" for name in servers},
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "GITHUB_STEP_SUMMARY": str(folder / "summary"),
        "GITHUB_REPOSITORY": "someone/convoy",
        "STATUS": str(status),
        **environment,
    }
    return subprocess.run([str(SCRIPT)], env=variables, cwd=folder, capture_output=True, text=True, timeout=30)


@pytest.mark.parametrize(
    ("status", "event", "ends_with"),
    [
        *((0, event, 0) for event in ("push", "schedule")),
        *((1, event, 1) for event in ("push", "schedule")),
        *((2, event, 2) for event in ("push", "schedule")),
        (3, "push", 3),
        (3, "pull_request", 3),
        (3, "schedule", 0),  # the champion stays; no user waits for the result
        *((75, event, 75) for event in ("push", "schedule")),
    ],
)
def test_the_job_ends_as_the_retraining_did(folder: Path, status: int, event: str, ends_with: int) -> None:
    done = run(folder, status, GITHUB_EVENT_NAME=event)
    assert done.returncode == ends_with, done.stderr
    assert (folder / "summary").read_text() == "### a report\n"
    assert json.loads((folder / "retrain.json").read_text()) == {"status": "whatever"}
    annotation = {0: "", 3: "::notice title=Refused::", 75: "::warning title=Interrupted::"}.get(status, "::error ")
    assert done.stdout.startswith(annotation) and bool(done.stdout) == bool(annotation)
    assert not (folder / "calls").exists()


def test_what_was_asked_for_reaches_the_command_as_it_is(folder: Path) -> None:
    hostile = 'digits"; echo $(id) `id` --force\nx'
    run(folder, 0, DEPLOYMENT="retrain/d e", DATASET=hostile, MODEL="notes", FORCE="true")
    asked = (folder / "arguments").read_text()
    wanted = ["retrain", "--wait", "--force", "--deployment", "retrain/d e", "--set", f"dataset={hostile}"]
    assert asked == "\n".join([*wanted, "--set", "model=notes", "--report", "report.md", "--json", ""])

    code = {"COMMIT": "0123abc", "REPOSITORY": "https://host.example/team/project.git"}
    run(folder, 0, **code)
    where = ["--repository", "https://host.example/team/project.git"]
    assert (folder / "arguments").read_text().split()[:6] == ["retrain", "--wait", "--commit", "0123abc", *where]

    run(folder, 0, **code, TRIAL="pull-12", FORCE="true", DEPLOYMENT="retrain/d")
    tried = ["trial", "0123abc", "--key", "pull-12", "--deployment", "retrain/d", *where]
    assert (folder / "arguments").read_text().split() == [*tried, "--report", "report.md", "--json"]

    run(folder, 0, DEPLOYMENT="", DATASET="", MODEL="", FORCE="false")
    assert (folder / "arguments").read_text().split() == ["retrain", "--wait", "--report", "report.md", "--json"]


HEAD = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("event", "comment", "branch_of", "pinned"),
    [
        ("pull_request", "", "", "seen-by-the-event"),
        ("issue_comment", f"/trial {HEAD}", "someone/convoy", HEAD),
        ("issue_comment", f"/trial {HEAD[:7]}\r\nplease", "someone/convoy", HEAD),
        ("issue_comment", f"/trial {HEAD[:6]}", "someone/convoy", None),  # too short to mean one commit
        ("issue_comment", "/trial fedcba9", "someone/convoy", None),  # a later push came after what this person saw
        ("issue_comment", "/trial main", "someone/convoy", None),
        ("issue_comment", "/trial $(touch hacked)", "someone/convoy", None),
        ("issue_comment", f"/trial {HEAD}", "a-fork/convoy", None),
    ],
)
def test_a_trial_is_of_the_commit_that_its_author_has_seen(
    folder: Path, event: str, comment: str, branch_of: str, pinned: str | None
) -> None:
    (pin,) = [step for step in steps() if step.get("id") == "pinned"]
    (folder / "bin" / "gh").write_text(f"#!/bin/sh\necho '{HEAD} {branch_of}'\n")
    variables = {"GITHUB_EVENT_NAME": event, "GITHUB_REPOSITORY": "someone/convoy", "COMMENT": comment, "NUMBER": "12"}
    variables |= {"COMMIT": "seen-by-the-event", "GITHUB_OUTPUT": str(folder / "output")}
    variables["PATH"] = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    # As GitHub runs it: https://docs.github.com/actions/reference/workflows-and-actions/workflow-syntax
    done = subprocess.run(["bash", "-e", "-c", pin["run"]], env=variables, cwd=folder, capture_output=True, text=True)
    if pinned is None:
        assert (done.returncode, done.stdout[:9]) == (1, "::error::")
        assert not (folder / "output").exists()
    else:
        assert (done.returncode, (folder / "output").read_text()) == (0, f"commit={pinned}\n")
    assert not (folder / "hacked").exists()


def test_without_a_report_the_summary_says_so(folder: Path) -> None:
    (folder / "report.md").write_text("of another run")
    assert run(folder, 1, NO_REPORT="1").returncode == 1
    assert (folder / "summary").read_text().startswith("### Retraining: **no report** (exit status 1)")


@pytest.mark.parametrize(
    ("existing", "call"),
    [
        ("", "api --method POST repos/someone/convoy/issues/12/comments --field body=@comment.md --silent"),
        ("34", "api --method PATCH repos/someone/convoy/issues/comments/34 --field body=@comment.md --silent"),
    ],
)
def test_a_pull_request_has_one_comment_which_is_renewed(folder: Path, existing: str, call: str) -> None:
    assert run(folder, 3, PULL_REQUEST="12", COMMENT=existing).returncode == 3
    assert (folder / "calls").read_text().splitlines()[1:] == [call]
    assert (folder / "comment.md").read_text() == "<!-- convoy retrain -->\n### a report\n"


def test_a_comment_that_cannot_be_written_changes_nothing(folder: Path) -> None:
    done = run(folder, 0, PULL_REQUEST="12", GH_STATUS="1")
    assert done.returncode == 0
    assert done.stdout.startswith("::warning::")
    assert len((folder / "calls").read_text().splitlines()) == 1  # no second comment after a failed search


def test_the_workflow_gives_the_action_only_inputs_that_it_has() -> None:
    action = yaml.safe_load((ACTION / "action.yml").read_text())
    calls = [step for step in steps() if step.get("uses") == "./.github/actions/retrain"]
    assert calls
    for call in calls:
        assert call["with"].keys() <= action["inputs"].keys()
        assert call["with"].keys() >= {name for name, each in action["inputs"].items() if each.get("required")}


@pytest.mark.slow
def test_asking_takes_a_small_environment(deployed: Callable[..., str], tmp_path: Path) -> None:
    python = tmp_path / "ask" / "bin" / "python"
    uv = shutil.which("uv", path=str(Path(sys.executable).parent))
    assert uv
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, str(tmp_path / "ask")], check=True)
    install = [uv, "pip", "install", "--quiet", "--python", str(python), "-r", str(ACTION / "requirements.txt")]
    subprocess.run(install, check=True)
    size = sum(file.lstat().st_size for file in (tmp_path / "ask").rglob("*") if file.is_file())
    assert size < 100e6

    name = deployed("asked-small")
    options = ("-d", name, "--commit", "0123abc", "--repository", "https://host.example/team/project.git", "--json")
    environment = os.environ | {"CONVOY_ASK_PYTHON": str(python), "CI": "true"}
    command = [str(ACTION / "convoy"), "retrain", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    asked = run_of(json.loads(done.stdout)["prefect_flow_run_id"])
    assert asked.labels["convoy.started_by"] == "CI"
    assert asked.job_variables == {
        "command": "python -m flows.at_commit",
        "env": {"CONVOY_REPOSITORY": "https://host.example/team/project.git", "CONVOY_COMMIT": "0123abc"},
    }


@pytest.mark.parametrize("missing", ["PREFECT_API_URL"])
def test_a_missing_secret_is_named(folder: Path, missing: str) -> None:
    done = run(folder, 0, **{missing: ""})
    assert done.returncode == 2
    assert done.stdout == f"::error::the secret {missing} is not set\n"
    assert not (folder / "arguments").exists()


def try_newest(folder: Path, which: str, breaks: str = "") -> "subprocess.CompletedProcess[str]":
    """Runs the script that tests new versions, in which one target of `make` fails."""
    (folder / "bin" / "make").write_text(MAKE)
    (folder / "bin" / "make").chmod(0o755)
    (folder / "requirements.lock").write_text("gone==3.0 \\\n    --hash=x\nkept==1.0 \\\nmoved==1.5 \\\n")
    shutil.copy(REPOSITORY / "pyproject.toml", folder)
    variables = {"PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}", "BREAKS": breaks}
    variables["GITHUB_STEP_SUMMARY"] = str(folder / "summary")
    return subprocess.run([NEWEST, which], env=variables, cwd=folder, capture_output=True, text=True, timeout=30)


def test_newest_versions_that_pass_are_named(folder: Path) -> None:
    done = try_newest(folder, "allowed")
    assert done.returncode == 0, done.stderr
    assert (folder / "calls").read_text().splitlines() == ["lock ARGS=--upgrade", "lint", "test"]
    summary = (folder / "summary").read_text()
    assert summary.startswith("### Newest versions: allowed\n\n- `make lock`: passed\n- `make lint`: passed\n")
    assert "```diff\n- gone==3.0\n- moved==1.5\n+ moved==2.0\n+ new==0.1\n```\n" in summary
    assert (folder / "pyproject.toml").read_bytes() == (REPOSITORY / "pyproject.toml").read_bytes()


@pytest.mark.parametrize(
    ("breaks", "asked", "said"),
    [
        ("lock", ["lock ARGS=--upgrade"], "- `make lock`: **failed**\n"),
        ("lint", ["lock ARGS=--upgrade", "lint", "test"], "- `make lint`: **failed**\n"),
        (
            "test",
            ["lock ARGS=--upgrade", "lint", "test"],
            "**failed**\n\n```\nFAILED tests/a.py::test_b - assert 1\n```\n",
        ),
    ],
)
def test_what_newest_versions_break_is_said(folder: Path, breaks: str, asked: list[str], said: str) -> None:
    assert try_newest(folder, "allowed", breaks).returncode == 1
    assert (folder / "calls").read_text().splitlines() == asked
    assert said in (folder / "summary").read_text()
    assert "+ moved==2.0" in (folder / "summary").read_text()


def test_beyond_the_pins_every_requirement_has_a_lower_bound_only(folder: Path) -> None:
    assert try_newest(folder, "beyond").returncode == 0
    ours, theirs = (tomllib.loads((where / "pyproject.toml").read_text())["project"] for where in (REPOSITORY, folder))
    groups = [theirs["dependencies"], *theirs["optional-dependencies"].values()]
    assert not [line for group in groups for line in group if "==" in line or "<" in line]
    assert [re.split(r"[=<>]", line)[0] for line in theirs["dependencies"]] == [
        re.split(r"[=<>]", line)[0] for line in ours["dependencies"]
    ]
    assert "torch>=" + next(line for line in ours["dependencies"] if line.startswith("torch=="))[7:] in groups[0]
    assert try_newest(folder, "everything").returncode == 2
