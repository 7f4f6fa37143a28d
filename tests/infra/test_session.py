"""The tests' own behaviour."""

import signal
import subprocess
import sys
from importlib.util import cache_from_source, find_spec
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

TEST = """
import sys, time
def test_that_is_interrupted_and_swallows_it():
    try:
        print("begun", file=sys.__stderr__, flush=True)
        time.sleep(60)
    except BaseException:
        pass
def test_that_does_not_begin():
    print("begun", file=sys.__stderr__, flush=True)
"""


def test_setup_has_compiled_all_packages_so_that_processes_start_in_half_the_time() -> None:
    package = Path(find_spec("mlflow").origin).parent
    missing = [file for file in package.rglob("*.py") if not Path(cache_from_source(file)).exists()]
    assert not missing, "remove .venv, and run `make setup`"


@pytest.mark.long
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_session(tmp_path: Path, sent: signal.Signals) -> None:
    (tmp_path / "test_two.py").write_text(TEST)
    options = ["-p", "tests.conftest", "-p", "no:cacheprovider", "-q", "-s", f"--rootdir={tmp_path}", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-c", "/dev/null", *options],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr
        assert process.stderr.readline() == "begun\n"
        process.send_signal(sent)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 2, out
    assert "begun" not in err
    assert f"ended by {sent.name}" in out
