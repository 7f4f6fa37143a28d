"""`import convoy`: the script of the page, and what programs get instead of an error line."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from infra.stack.endpoints import Endpoints
from tests.conftest import REPOSITORY, USERS_OWN
from tests.flows.test_cli import pictures
from tests.flows.test_sweep import NETWORK

PAGE = REPOSITORY / "flows" / "README.md"


def python(program: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    """Runs a program that lies in a folder, whose modules Python therefore finds first."""
    (folder / "program.py").write_text(program)
    return subprocess.run([sys.executable, "program.py"], cwd=folder, env=os.environ, capture_output=True, text=True)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder that has packages with the names of Convoy's own."""
    for name in ("tasks", "cnn"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("VALUE = 3")
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_script_of_the_page_runs_as_written(stack: object, project: Path) -> None:
    (program,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    pictures(project / "photos", 3)
    (project / "photos" / "bad.png").write_text("text")
    done = python(program, project)
    assert done.returncode == 0, done.stderr
    first, again, refused, verdict, promotion, predicted = done.stdout.splitlines()
    assert re.fullmatch(r"from-python 1 champion \d\d\.\d%", first)
    assert again == "unchanged - nothing has changed since the champion, version 1"
    assert refused.startswith("3 2 refused: from-python/2 ")
    assert re.fullmatch(r"False \d+ \d\d\.\d%", verdict)
    assert promotion == "1 -> 2"
    assert predicted.startswith("4 1 {'")
    assert len((project / "result.csv").read_text().splitlines()) == 5


@pytest.mark.long
def test_mistakes_are_raised_and_end_no_program(project: Path) -> None:
    (project / "convoy.yaml").write_text("epochs: 3\naugment: {shift: 3}")
    done = python(
        """
import sys, convoy
from flows.interface import _read
heavy = {"torch", "prefect", "mlflow", "boto3"} & set(sys.modules)
def refused(function, *arguments, **keys):
    try:
        function(*arguments, **keys)
    except (convoy.UsageError, convoy.InputError) as error:
        print(error.exit_status, error)
config = _read(None, None, {"lr": 0.5, "augment": {"cutout": 2}})
print(heavy, config.epochs, config.lr, config.augment.shift, config.augment.cutout)
refused(convoy.train, epoch=3)
refused(convoy.train, dataset="digit")
refused(convoy.retrain, "/dev/null", dataset="digits", model="notes")
refused(convoy.retrain, recipe="foto")
refused(convoy.compare, "a", "b", margn=0.1)
refused(convoy.promote, "a", 1, floor=2)
refused(convoy.train, dataset="digits", refresh=["downlod"])
""",
        project,
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[0] == "set() 3 0.5 3 2"
    for line, part in zip(
        said[1:],
        (
            "unknown key 'epoch'; did you mean 'epochs'?",
            "did you mean digits?",
            "images of 8×8 pixels are too small for notes",
            "unknown recipe 'foto'; did you mean 'photos'?",
            "unknown key 'margn'; did you mean 'margin'?",
            "floor: input should be less than or equal to 1",
            "refresh: 'downlod' is not a valid Step; known are download, preprocess",
        ),
        strict=True,
    ):
        assert line.startswith("2 ") and part in line
    assert not (project / ".convoy").exists()
    assert set(done.stderr.splitlines()) == {"configuration: convoy.yaml"}


@pytest.mark.long
def test_a_program_is_told_that_its_network_has_changed_since_it_was_loaded(project: Path) -> None:
    """Python imports a module once, so a retraining would find the code unchanged."""
    (project / "nets.py").write_text(NETWORK)
    done = python(
        """
import convoy
from pathlib import Path
from flows.interface import _read
print(_read(None, None, {"model": "nets:Net"}).model)
file = Path("nets.py")
file.write_text(file.read_text().replace("width: int = 4", "width: int = 8"))
try:
    convoy.retrain(model="nets:Net")
except convoy.UsageError as error:
    print(error)
""",
        project,
    )
    assert done.returncode == 0, done.stderr
    expected = "nets:Net: nets.py has changed since this program loaded it; restart the program"
    assert done.stdout.splitlines() == ["nets:Net", expected]


def test_a_program_goes_on_after_ctrl_c(project: Path) -> None:
    done = python(
        """
import os, signal, convoy
from infra.machine import stopping
stopping.overhear()  # as each flow does
try:
    os.kill(os.getpid(), signal.SIGINT)
    signal.pause()
except KeyboardInterrupt:
    print(stopping.asked())
try:
    convoy.train(dataset="digit")
except convoy.UsageError:
    print(stopping.asked())
""",
        project,
    )
    assert (done.returncode, done.stdout) == (0, "interrupted\nNone\n"), done.stderr


def test_a_program_hears_of_a_signal_that_came_after_the_last_check_of_a_flow(project: Path) -> None:
    done = python(
        """
import os, signal, convoy
from flows.interface import _known_errors
from infra.machine import stopping
signal.signal(signal.SIGTERM, lambda *_: print("ours"))
stopping.overhear()
with _known_errors():
    os.kill(os.getpid(), signal.SIGTERM)
with _known_errors():
    ours = signal.signal(signal.SIGTERM, stopping.defer)  # as while a flow runs
    os.kill(os.getpid(), signal.SIGTERM)
    signal.signal(signal.SIGTERM, ours)
    print("flow ends")
""",
        project,
    )
    assert (done.returncode, done.stdout) == (0, "ours\nflow ends\nours\n"), done.stderr


def test_a_server_that_does_not_run_is_an_error_to_catch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(USERS_OWN)]:
        monkeypatch.delenv(name)  # they may name the servers of other tests
    program = (
        "import convoy\n"
        "try: convoy.compare('a', 'b')\n"
        "except convoy.ServiceError as error: print(error.exit_status, error)"
    )
    done = python(program, tmp_path)
    said = f"1 not running in {tmp_path}/.convoy: seaweedfs, mlflow; `convoy up` starts them\n"
    assert (done.returncode, done.stdout) == (0, said), done.stderr


@pytest.mark.long
@pytest.mark.parametrize(
    "before",
    [
        "check_before_servers(load_config(None, ['dataset=digits']))",  # as `convoy train` does
        "import prefect.context; servers_to_read()",  # a program that compares before it trains
    ],
)
def test_prefect_loaded_before_the_servers_uses_their_server(stack: Endpoints, tmp_path: Path, before: str) -> None:
    """Otherwise it would start a temporary server of its own, which times out on a busy machine."""
    done = python(
        f"""
import os, sys, convoy
from flows.cli.console import servers_to_read, servers_up
from flows.cli.in_process import check_before_servers
from tasks.config.run import load_config
for name in [name for name in os.environ if name.startswith(("AWS_", "MLFLOW_", "PREFECT_"))]:
    del os.environ[name]
os.environ["CONVOY_HOME"] = {str(stack.home)!r}
{before}
print("prefect.context" in sys.modules)
servers_up()
from prefect.settings import PREFECT_API_URL
print(PREFECT_API_URL.value())
""",
        tmp_path,
    )
    assert done.stdout.splitlines() == ["True", stack.prefect_api_url], done.stderr


def test_a_program_that_has_loaded_its_own_package_first_is_told_so(project: Path) -> None:
    done = python("import tasks, convoy", project)
    assert done.returncode == 1
    expected = f"tasks ({project}/tasks/__init__.py) is loaded, and Convoy has a package of that name"
    assert f"ImportError: {expected}: import convoy first" in done.stderr
