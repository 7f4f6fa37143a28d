"""Convoy as a wheel, installed outside the repository, in a folder that has packages of the same names."""

import os
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.flows.program import running_worker, wait_for

REPOSITORY = Path(__file__).parents[2]
DEPLOYMENT = """
name: wheel
pull: []
deployments:
  - name: wheel
    entrypoint: flows.retrain.retrain_flow
    work_pool: {name: wheel}
    parameters:
      config:
        {dataset: digits, name: wheel, ranks: 1, epochs: 1, network: {width: 4}, gate: {min_class_recall: 0},
         serving: {http: false}}
"""


def built_wheel(folder: Path) -> Path:
    """Builds the wheel into a folder; returns its path."""
    build = [Path(sys.executable).with_name("uv"), "build", "--quiet", "--wheel", "--out-dir", folder, REPOSITORY]
    subprocess.run(build, check=True, capture_output=True, text=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns `convoy` of an environment that has the wheel, and of this one only the libraries."""
    folder = tmp_path_factory.mktemp("wheel")
    uv = Path(sys.executable).with_name("uv")
    wheel = built_wheel(folder)
    venv.create(folder / "environment", symlinks=True)
    python = folder / "environment" / "bin" / "python"
    subprocess.run([uv, "pip", "install", "--quiet", "--python", python, "--no-deps", wheel], check=True)
    (site,) = (folder / "environment").glob("lib/*/site-packages")
    # A path in a .pth file is searched, but its own .pth files are not read: this repository is not found by them.
    (site / "libraries.pth").write_text(str(Path(torch.__file__).parents[1]))
    return python.with_name("convoy")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name in ("cnn", "infra", "tasks", "flows"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('not this one')")
    (tmp_path / "wheel.yaml").write_text(DEPLOYMENT)
    return tmp_path


@pytest.fixture
def worker(installed: Path, project: Path, stack: object) -> Iterator["subprocess.Popen[bytes]"]:
    with running_worker(project, "wheel", convoy=[installed]) as worker:
        yield worker


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_wheel_trains_deploys_and_works_beside_packages_of_the_same_names(
    installed: Path, project: Path, stack: object, worker: "subprocess.Popen[bytes]"
) -> None:
    def convoy(*arguments: str) -> str:
        done = subprocess.run([installed, *arguments], cwd=project, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code = [installed.with_name("python"), "-P", "-c", "import flows; print(flows.__file__)"]
    found = Path(subprocess.run(code, cwd=project, env=environment, capture_output=True, text=True, check=True).stdout)
    assert not found.is_relative_to(REPOSITORY)
    keys = ("network.width=4", "gate.min_class_recall=0")
    small = [f"--set={key}" for key in keys]
    convoy("train", "--dataset", "digits", "--name", "wheel", "--epochs", "1", "--ranks", "2", *small)
    assert "retrain/fashion-mnist" in convoy("deploy")  # of the file that the wheel brings
    convoy("deploy", "--file", "wheel.yaml")
    wait_for(lambda: worker.poll() is None and b"started" in (project / "log").read_bytes(), "the worker to start")
    assert "wheel" in convoy("retrain", "-d", "retrain/wheel", "--wait", "--json")
