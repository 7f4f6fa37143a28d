"""`convoy` in a folder, or with a PYTHONPATH, that holds modules with the names of Convoy's own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONVOY = Path(sys.executable).parent / "convoy"
CHILDREN = """
import subprocess, sys
from convoy_cli import use_own_packages
use_own_packages()
for program in ("import cnn.config.training, infra.settings, tasks.config.run, flows.cli", "import flows.summary"):
    subprocess.run([sys.executable, "-c", program], check=True)
subprocess.run([sys.executable, "-m", "tasks.config.key_values"], check=True)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder of another project."""
    for name in ("tasks.py", "flows.py", "yaml.py", "cnn/__init__.py", "infra/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("raise SystemExit('not this one')" if name.endswith(".py") else "")
    return tmp_path


@pytest.mark.long
@pytest.mark.parametrize("path", [".", "", "/nonexistent"])
def test_modules_of_the_same_names_do_no_harm(project: Path, path: str) -> None:
    environment = os.environ | {"PYTHONPATH": path}
    if not path:
        del environment["PYTHONPATH"]
    (project / "yaml.py").unlink()  # of other libraries' names nothing is promised for PYTHONPATH
    for command in ([CONVOY, "config"], [sys.executable, "-P", "-c", CHILDREN]):
        done = subprocess.run(command, env=environment, cwd=project, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")


def test_children_do_not_look_into_the_working_folder(project: Path) -> None:
    program = "from convoy_cli import use_own_packages as use; use(); import subprocess, sys; " + (
        "subprocess.run([sys.executable, '-c', 'import yaml'], check=True)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], cwd=project, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
