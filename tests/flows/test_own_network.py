"""Whole trainings of a network of one's own, by commands and a worker in a project's folder."""

import json
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow.artifacts import load_text
from mlflow.tracking import MlflowClient
from PIL import Image
from sklearn.datasets import load_digits

from tests.flows.conftest import Convoy
from tests.flows.program import LET_PASS, PATIENCE, NextTraining, Program, running_worker, sets
from tests.own_project import EXAMPLE, write

MODEL = "nets.small:Small"
PROJECT = {
    "nets/__init__.py": "",
    "nets/small.py": EXAMPLE.replace("nn.ReLU()", "activation()", 1).replace(
        "from torch import Tensor, nn\n", "from torch import Tensor, nn\n\nfrom nets.parts import activation\n"
    ),
    "nets/parts.py": "from torch import nn\n\n\ndef activation():\n    return nn.ReLU()\n",
    "tasks/__init__.py": "raise RuntimeError('the project has a package of this name, too')\n",
    "tasks/chores.py": "",
    "yaml.py": "raise RuntimeError('and this one')\n",
}
SETTINGS = ("data.limit=400", "network.width=4", "network.dropout=0.1", "batch_size=64", "augment.shift=0", *LET_PASS)
TRAIN = ("train", "--dataset", "digits", "--model", MODEL, *sets(*SETTINGS))


@pytest.fixture
def own(project: Path) -> Path:
    write(project, PROJECT)
    return project


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_weights_are_equal_on_1_and_2_ranks_and_2_nodes_and_the_version_needs_neither_convoy_nor_the_network(
    own: Path, program: Callable[..., Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONVOY_SLOTS", "1")
    joined = program("join", "--ranks", "1")
    found: list[dict[str, Any]] = []
    for where in ("ranks=1", "ranks=2", "launcher=nodes"):
        file = own / f"{where}.json"
        options = sets(where, "nodes.min=2", "nodes.wait=60", f"name=own-{where.replace('=', '-')}")
        done = program(*TRAIN, *options, "--epochs", "2", "--summary", str(file)).wait(3 * PATIENCE)
        assert done.status == 0, done.stderr
        found.append(json.loads(file.read_text()))
    joined.process.terminate()
    assert joined.wait().status == 0
    one, two, nodes = found
    assert (one["world_size"], two["world_size"], nodes["world_size"]) == (1, 2, 2)
    assert one["weights_sha256"] == two["weights_sha256"] == nodes["weights_sha256"]
    assert one["accuracy"] == two["accuracy"] == nodes["accuracy"]

    run = MlflowClient().get_run(two["mlflow_run_id"])
    assert (run.data.params["model"], run.data.params["network.dropout"]) == (MODEL, "0.1")
    manifest = json.loads(load_text(f"runs:/{run.info.run_id}/manifest.json"))
    assert [*manifest["network_files"]] == ["nets/__init__.py", "nets/parts.py", "nets/small.py"]
    assert manifest["config"]["network"] == {"width": 4, "dropout": 0.1}
    report = json.loads(load_text(f"runs:/{run.info.run_id}/report/serving.json"))
    loads = report["checks"][0]
    assert loads["passed"] and "none of cnn, convoy_cli, flows, infra, tasks, nets can be imported" in loads["detail"]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            {"nets/small.py": "import nothere\n"},
            f"{MODEL}, nets/small.py:1: ModuleNotFoundError: No module named 'nothere'",
        ),
        (
            {"nets/parts.py": "def activation():\n    return None\n"},
            f"{MODEL}, nets/small.py:24: TypeError: 'NoneType' object is not callable",
        ),
    ],
)
def test_mistake_in_the_network_is_one_line_with_its_place(
    own: Path, convoy: Convoy, change: dict[str, str], complaint: str
) -> None:
    write(own, change)
    done = convoy(*TRAIN)
    assert (done.status, done.complaint, done.stdout) == (2, complaint, "")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_file_that_changes_while_the_ranks_restart_ends_the_training(
    own: Path, program: Callable[..., Program], next_training: NextTraining
) -> None:
    started = program(*TRAIN, "--epochs", "100000", "--name", "own-edited", "--ranks", "2")
    training = next_training.under_way()
    write(own, {"nets/parts.py": PROJECT["nets/parts.py"].replace("ReLU", "SiLU")})
    training.rank(1).send_signal(signal.SIGKILL)
    done = started.wait(3 * PATIENCE)
    assert done.status == 2
    assert done.complaint.startswith(f"{MODEL}: nets/parts.py changed after this training had begun; ")


@pytest.fixture
def worker(own: Path, stack: object, quiet_prefect: None) -> Iterator["subprocess.Popen[bytes]"]:
    """A worker of this project, in whose folder the images lie as well."""
    from flows.deployments import deploy

    digits = load_digits()
    for number, (image, label) in enumerate(zip(digits.images[:400], digits.target, strict=False)):
        folder = own / "photos" / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15).astype("uint8")).save(folder / f"{number}.png")
    config = {
        **{"dataset": "photos", "name": "own-served", "model": MODEL, "network": {"width": 4}, "ranks": 1, "epochs": 2},
        **{"batch_size": 32, "augment": {"flip": False}, "serving": {"http": False}},
        "gate": {"floor": 0.0, "min_class_recall": 0.0},
    }
    deployment = {
        "name": "own-served",
        "entrypoint": "flows.retrain.retrain_flow",
        "parameters": {"config": config},
        "work_pool": {"name": "test-pool"},
    }
    (own / "prefect.yaml").write_text(yaml.safe_dump({"name": "convoy", "pull": [], "deployments": [deployment]}))
    assert list(deploy(own / "prefect.yaml")) == ["retrain/own-served"]
    with running_worker(own, "test-pool") as worker:
        yield worker


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_worker_trains_the_network_of_its_folder_and_again_once_its_code_has_changed(
    own: Path, worker: "subprocess.Popen[bytes]", convoy: Convoy
) -> None:
    ask = ("retrain", "-d", "own-served", "--wait", "--json")

    def asked() -> dict[str, Any]:
        done = convoy(*ask)
        assert done.status == 0, f"{done.stderr}\n{(own / 'log').read_text()[-4000:]}"
        return json.loads(done.stdout)  # type: ignore[no-any-return]

    first = asked()
    assert (first["status"], first["reason"]) == ("done", "there is no champion yet")
    assert MlflowClient().get_run(first["mlflow_run_id"]).data.params["network.dropout"] == "0.0"
    write(own, {"nets/parts.py": "# nothing new\n" + PROJECT["nets/parts.py"]})
    assert asked()["status"] == "unchanged"
    write(own, {"nets/parts.py": PROJECT["nets/parts.py"].replace("ReLU", "SiLU")})
    again = asked()
    assert again["reason"] == "changed since the champion, version 1: code (nets/parts.py)"
    assert again["weights_sha256"] != first["weights_sha256"]
