"""Checks pages with code: the blocks of `.github/extending`, applied to a copy of the repository, pass their tests.

A block in `python` whose first line is a comment with a path is a new file. A block in `diff` changes the file named in
its first line: its lines that begin with a space or `-` stand there exactly once. A line that begins with `convoy
config` is run.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PAGES = REPOSITORY / ".github" / "extending"
PRODUCT = ("cnn", "infra", "tasks", "flows")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CONVOY = "from flows.cli import main; main()"


@dataclass(frozen=True)
class Extended:
    """A copy of the repository to which a page was applied."""

    folder: Path
    new: list[str]
    changed: list[str]
    commands: list[list[str]]

    def run(self, *arguments: str) -> str:
        """Runs Python in the copy, with the copy's packages; returns what it printed."""
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": str(self.folder), "PYTHONDONTWRITEBYTECODE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def passes_its_tests(self, marker: str = "not slow") -> None:
        tests = [file for file in self.new if Path(file).name.startswith("test_")]
        assert tests
        said = self.run(
            "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", "-o", "addopts=", "-m", marker, *tests
        )
        assert " passed" in said and "skipped" not in said, said


@pytest.fixture
def extended(request: pytest.FixtureRequest, tmp_path: Path) -> Extended:
    """Returns the copy for the page that a test names."""
    folder = tmp_path / "convoy"
    for name in (*PRODUCT, "tests", ".github"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "screenshots"))
    shutil.copy(REPOSITORY / "pyproject.toml", folder)
    blocks = BLOCK.findall((PAGES / request.param).read_text())
    new, changed, commands = [], [], []
    for language, text in blocks:
        head, _, body = text.partition("\n")
        if language == "python" and head.startswith("# "):
            new.append(head.removeprefix("# "))
            assert not (folder / new[-1]).exists()
            (folder / new[-1]).write_text(body)
        elif language == "diff":
            changed.append(head.removeprefix("--- "))
            _change(folder / changed[-1], body.splitlines())
        elif not language:
            commands += [
                shlex.split(line, comments=True) for line in text.splitlines() if line.startswith("convoy config")
            ]
    return Extended(folder, new, sorted(set(changed)), commands)


def _change(file: Path, lines: list[str]) -> None:
    """Applies a block of a diff."""
    old = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("+"))
    new = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("-"))
    text = file.read_text()
    assert text.count(old) == 1, f"{file.name} has {text.count(old)} times: {old}"
    file.write_text(text.replace(old, new))


@pytest.mark.long
def test_the_library_example_trains_evaluates_and_exports(tmp_path: Path) -> None:
    ((_, program),) = (
        block for block in BLOCK.findall((REPOSITORY / "cnn/README.md").read_text()) if block[0] == "python"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    accuracy, predicted = done.stdout.splitlines()[-2:]
    assert re.match(r"test: [89]\d\.\d\d%, weights [0-9a-f]{64}$", accuracy)
    assert re.match(r"\[[0-9, ]+\] \[[0-9, ]+\]$", predicted)


def of_page(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("extended", [name], indirect=True)


@pytest.mark.parametrize("extended", ["network.md", "data-set.md", "gate.md"], indirect=True)
def test_a_page_changes_at_most_two_files_of_the_product_and_its_code_is_as_ruff_wants_it(extended: Extended) -> None:
    assert 1 <= len([file for file in extended.changed if file.split("/")[0] in PRODUCT]) <= 2
    python = [*extended.new, *extended.changed]
    extended.run("-m", "ruff", "check", "--no-cache", *python)
    extended.run("-m", "ruff", "format", "--no-cache", "--check", *python)


@pytest.mark.long
@of_page("network.md")
def test_the_network_of_the_page_trains_to_equal_weights_on_1_and_2_ranks(extended: Extended) -> None:
    (command,) = extended.commands
    assert "model: tiny" in extended.run("-c", CONVOY, *command[1:])
    extended.passes_its_tests()


@pytest.mark.long
@of_page("data-set.md")
def test_the_data_set_of_the_page_is_fetched_and_opened(extended: Extended) -> None:
    extended.passes_its_tests()


@pytest.mark.long
@of_page("gate.md")
def test_the_gate_of_the_page_objects(extended: Extended) -> None:
    extended.passes_its_tests()


@pytest.mark.slow
@of_page("gate.md")
def test_the_gate_of_the_page_ends_a_flow_as_refused(extended: Extended) -> None:
    extended.passes_its_tests("slow")
