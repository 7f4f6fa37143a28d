"""The command line: what it refuses, in one line and with the right status, and a whole training by it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch
import yaml
from mlflow.tracking import MlflowClient
from PIL import Image
from typer.main import get_command

from flows.summary import Summary
from infra.settings import Settings
from infra.tracking.model_registry import aliased
from tasks.config.run import RunConfig
from tests.flows.conftest import CONFIG, Convoy
from tests.flows.program import SMALL, Program, sets

REFUSED = {
    "unknown dataset": (["--dataset", "fashon-mnist"], "did you mean fashion-mnist"),
    "missing folder": (["--dataset", "./no/such/folder"], "no such folder"),
    "unknown key": (["--set", "augment.shfit=1"], "did you mean 'augment.shift'"),
    "unknown model": (["--model", "convoy8"], "did you mean 'convoy9'"),
    "unknown model of timm's": (["--model", "timm/resnet18x"], "did you mean 'timm/resnet18'"),
    "size that no patch fits": (
        ["--model", "timm/vit_tiny_patch16_224", "--set", "data.image_size=28"],
        "set data.image_size=32",
    ),
    "unknown option of the model": (["--set", "network.hidden=[8]"], "unknown key"),
    "lr out of range": (["--set", "lr=-1"], "lr: "),
    "epochs out of range": (["--epochs", "0"], "epochs: "),
    "not a number": (["--set", "seed=many"], "seed: "),
    "no value": (["--set", "lr"], "key=value"),
    "ranks that do not divide the lanes": (["--ranks", "3"], "nearest are 2 and 4"),
    "batch that lanes do not divide": (["--set", "batch_size=30"], "nearest is 32"),
    "lanes that are no power of two": (["--set", "lanes=6"], "nearest are 4 and 8"),
    "name that MLflow refuses": (["--name", "a/b"], "name: "),
    "name that MLflow cannot search": (["--name", 'bob\'s "cats"'], "name: "),
    "limit out of range": (["--limit", "0"], "data.limit: "),
    "images that are too small": (["--dataset", "digits", "--model", "notes"], "8×8 pixels are too small for notes"),
    "size that is too small": (["--model", "convnext_tiny", "--set", "data.image_size=7"], "which needs 8×8"),
    "crops that are larger than the images": (
        ["--set", "data.image_size=32", "--set", "augment.crop_size=40"],
        "augment.crop_size=40 is larger than the images",
    ),
    "stage that the network lacks": (["--set", "finetune.freeze=layer9"], "has no stage 'layer9'; it has stem, stage1"),
    "file of weights that does not exist": (["--set", "pretrained=no.pth"], "the file no.pth does not exist"),
    "file of weights that cannot exist": (["--set", f"pretrained={'x' * 300}"], "does not exist"),
    "floor that no test split shows": (["--set", "gate.floor=1"], "gate.floor: 10,000 test images can never show"),
    "floor for more test images": (["--set", "gate.floor=0.9999"], "it needs 38,411; set it to at most 0.9996"),
}


COMMANDS = (
    "train sweep resume join runs config init up down status env models promote rollback history compare predict "
    "errors export data deploy worker retrain trial cancel notify-data notify prune doctor"
)


@pytest.fixture
def summary(tmp_path: Path) -> Callable[[], dict[str, object]]:
    return lambda: json.loads((tmp_path / "out.json").read_bytes())


@pytest.mark.parametrize("arguments, hint", REFUSED.values(), ids=REFUSED)
def test_mistake_is_refused_in_one_line_that_says_what_would_do(
    convoy: Convoy, tmp_path: Path, summary: Callable[[], dict[str, object]], arguments: list[str], hint: str
) -> None:
    done = convoy("train", *arguments, "--summary", str(tmp_path / "out.json"))
    assert (done.status, done.stdout) == (2, "")
    assert hint in done.complaint
    assert len(done.stderr.splitlines()) == 1
    assert (summary()["status"], summary()["exit_status"]) == ("failed", 2)
    assert hint in str(summary()["error"])


@pytest.mark.parametrize(
    "content, hint",
    [
        (None, "cannot read the configuration"),
        ("epochs: [1", "not valid YAML"),
        ("just text", "must hold keys and values"),
        ("epoch: 3", "did you mean 'epochs'"),
        (b"\xff\xfe\x00", "cannot read the configuration"),
    ],
    ids=["missing", "bad YAML", "no mapping", "unknown key", "binary"],
)
def test_unusable_configuration_file_is_named(
    convoy: Convoy, tmp_path: Path, content: str | bytes | None, hint: str
) -> None:
    file = tmp_path / "config.yaml"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    done = convoy("train", "--config", str(file))
    assert done.status == 2
    assert hint in done.complaint


@pytest.mark.parametrize("place", ["missing/out.json", "."])
def test_summary_that_cannot_be_written_is_refused_at_once(convoy: Convoy, tmp_path: Path, place: str) -> None:
    done = convoy("train", "--summary", str(tmp_path / place))
    assert done.status == 2
    assert "--summary" in done.complaint


def pictures(folder: Path, count: int, size: int = 8) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        noise = torch.randint(256, (size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
        Image.fromarray(noise.numpy()).save(folder / f"{number}.png")


def empty(folder: Path) -> None:
    folder.mkdir()


def class_without_images(folder: Path) -> None:
    pictures(folder / "cat", 20)
    (folder / "dog").mkdir()


def one_class(folder: Path) -> None:
    pictures(folder / "cat", 20)


def unreadable_images(folder: Path) -> None:
    pictures(folder / "cat", 20)
    pictures(folder / "dog", 20)
    for name in ("a", "b"):
        (folder / "dog" / f"{name}.png").write_bytes(b"not an image")


@pytest.mark.long
@pytest.mark.parametrize(
    "make, hint",
    [(empty, "photos"), (class_without_images, "dog"), (one_class, "cat"), (unreadable_images, "dog/a.png")],
)
def test_folder_that_cannot_be_learnt_from_is_refused_and_opens_no_run(
    convoy: Convoy,
    tmp_path: Path,
    summary: Callable[[], dict[str, object]],
    make: Callable[[Path], None],
    hint: str,
) -> None:
    make(tmp_path / "photos")
    before = MlflowClient().search_experiments()
    arguments = ["--dataset", str(tmp_path / "photos"), "--name", "refused", *sets(*SMALL)]
    done = convoy("train", *arguments, "--summary", str(tmp_path / "out.json"))
    assert done.status == 2
    assert hint in done.complaint
    assert summary()["exit_status"] == 2
    assert [e.name for e in MlflowClient().search_experiments()] == [e.name for e in before]
    assert aliased("refused", "challenger") is None


@pytest.mark.long
def test_batch_larger_than_the_training_split_is_refused_and_opens_no_run(
    convoy: Convoy, tmp_path: Path, summary: Callable[[], dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    arguments = ["--dataset", "digits", "--name", "refused", "--ranks", "1", *sets(*SMALL, "batch_size=512")]
    done = convoy("train", *arguments, "--summary", str(tmp_path / "out.json"))
    assert done.status == 2
    assert "400 images, fewer than a batch of 512" in done.complaint
    assert "digits is the data set of that name; for the folder here, write ./digits" in done.stderr
    assert summary()["exit_status"] == 2
    experiments = [experiment.experiment_id for experiment in MlflowClient().search_experiments()]
    assert not MlflowClient().search_runs(experiments, filter_string="tags.`convoy.model` = 'refused'")
    assert not MlflowClient().search_registered_models("name = 'refused'")


@pytest.mark.parametrize(
    ("variable", "value", "named"),
    [
        ("MLFLOW_TRACKING_URI", "http://127.0.0.1:9", "http://127.0.0.1:9"),
        ("AWS_SECRET_ACCESS_KEY", "wrong", "AWS_SECRET_ACCESS_KEY"),
    ],
    ids=["tracking-server-down", "wrong-credentials-for-the-bucket"],
)
def test_server_that_is_down_or_refuses_is_named(
    variable: str,
    value: str,
    named: str,
    convoy: Convoy,
    tmp_path: Path,
    summary: Callable[[], dict[str, object]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(variable, value)
    done = convoy("train", "--dataset", "digits", "--summary", str(tmp_path / "out.json"))
    assert done.status == 1
    assert named in done.complaint
    assert summary()["exit_status"] == 1


def test_printed_configuration_is_read_back_as_the_same(convoy: Convoy, tmp_path: Path) -> None:
    options = [
        "--dataset",
        "digits",
        "--model",
        "notes",
        *sets("network.dropout=0.5", "data.limit=7", "augment.cutout=2"),
    ]
    printed = convoy("config", *options)
    assert (printed.status, printed.stderr) == (0, "")
    (tmp_path / "config.yaml").write_text(printed.stdout)
    assert convoy("config", "--config", str(tmp_path / "config.yaml")).stdout == printed.stdout
    config = RunConfig.model_validate(yaml.safe_load(printed.stdout))
    assert config.dataset == "digits"
    assert (config.data.limit, config.augment.cutout, config.augment.flip) == (7, 2, False)
    assert config.resolved()["network"]["dropout"] == 0.5


def test_explained_configuration_is_read_back_as_the_same(convoy: Convoy, tmp_path: Path) -> None:
    options = ["--dataset", "digits", "--model", "notes", *sets("network.hidden=[8]")]
    explained = convoy("config", "--explain", *options)
    assert (explained.status, explained.stderr) == (0, "")
    assert "# Sizes of the fully connected layers before the last one; may be empty.\n" in explained.stdout
    (tmp_path / "config.yaml").write_text(explained.stdout)
    again = convoy("config", "--config", str(tmp_path / "config.yaml"))
    assert again.stdout == convoy("config", *options).stdout


def test_schema_is_printed_as_json(convoy: Convoy) -> None:
    schema = json.loads(convoy("config", "--schema").stdout)
    assert schema["properties"]["lr"]["description"] == "Peak learning rate."
    assert convoy("config", "--schema", "--explain").status == 2


@pytest.mark.parametrize("command", [[command] for command in COMMANDS.split()] + [[]])
def test_every_command_explains_itself(convoy: Convoy, command: list[str]) -> None:
    done = convoy(*command, "--help")
    assert done.status == 0
    assert "Usage: convoy" in done.stdout


def test_help_is_wrapped_by_the_width_of_the_terminal_only(convoy: Convoy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    about, example = convoy("retrain", "--help").stdout.split("Works with", 1)[1].split("convoy retrain", 1)
    lines = [line.strip() for line in f"Works with{about}".strip().splitlines()]
    assert len(lines) == 2
    assert len(f"{lines[0]} {lines[1].split()[0]}") > 78  # the next word did not fit
    assert example.splitlines()[0].strip() == "-d retrain/fashion-mnist --wait --report report.md"


def test_commands_are_those_that_scripts_rely_on(convoy: Convoy) -> None:
    from flows.cli.app import app  # listens to signals while it loads, so not before the fixture

    assert set(get_command(app).commands) == set(COMMANDS.split())  # type: ignore[attr-defined]


def test_version_is_that_of_the_package(convoy: Convoy) -> None:
    done = convoy("--version")
    assert (done.status, done.stdout) == (0, f"convoy {metadata.version('convoy-cnn')}\n")


def test_help_is_there_where_the_terminal_has_no_width(convoy: Convoy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "0")
    assert "Usage: convoy" in convoy("--help").stdout


HEAVY = "boto3 matplotlib mlflow prefect scipy.stats sklearn timm torch torch._dynamo torchmetrics torchvision"


def loaded_by(code: str, *arguments: str, folder: Path) -> str:
    """Returns the heavy libraries that a program has loaded when it ends."""
    told = f"atexit.register(lambda: print('LOADED', *sorted(set('{HEAVY}'.split()) & set(sys.modules)), flush=True))"
    command = [sys.executable, "-P", "-c", f"import atexit, sys\n{told}\n{code}", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    return done.stdout.splitlines()[-1].removeprefix("LOADED").strip()


# The command line ends by os._exit once it handles signals, so it is kept from ending before the check.
COMMAND = "from flows.cli import app as cli\nfrom infra.machine import stopping\nstopping.end = sys.exit\ncli.main()"


@pytest.mark.long
@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["promote", "--help"],
        ["train", "--set", "lr=-1"],
        ["train", "--set", "pretrained=imagenet"],
        ["train", "--dataset", "digit"],
        ["train", "--model", "timm/x"],
        ["errors", "photos", "--out", "errors.txt"],
        ["errors", "photos", "--corrected", "missing.csv", "--out", "labels.csv"],
        ["deploy", "--set", "epoch=3"],
        ["retrain", "--config", "missing.yaml"],
        ["init"],
    ],
)
def test_help_and_refusals_load_no_heavy_library(arguments: list[str], tmp_path: Path) -> None:
    assert loaded_by(COMMAND, *arguments, folder=tmp_path) == ""


@pytest.mark.long
@pytest.mark.parametrize(
    ("arguments", "loaded"),
    [
        (["status"], "boto3 prefect"),
        (["config", "--explain"], ""),
        (["config", "--model", "timm/resnet18d"], ""),
        (["config", "--schema"], ""),
        (["config", "--json"], ""),
        (["status", "--json"], ""),
        (["runs"], "boto3 mlflow"),
        (["models"], "boto3 mlflow"),
        (["data", "diff", "nobodys", "nobodys"], "boto3 mlflow"),
        (["data", "check", "nothing.csv"], "boto3"),
        (["history", "nobodys"], "boto3 mlflow"),
        (["retrain", "-d", "nobodys"], "prefect"),
        (["notify-data", "nobodys"], "prefect"),
        (["doctor"], "boto3 mlflow prefect"),
        (["predict", "nobodys", "."], "boto3 mlflow prefect"),
        (["errors", "nobodys", "--out", "errors.csv"], "boto3 mlflow prefect"),
    ],
)
def test_a_command_loads_only_what_it_needs(stack: object, arguments: list[str], loaded: str, tmp_path: Path) -> None:
    assert set(loaded_by(COMMAND, *arguments, folder=tmp_path).split()) <= set(loaded.split())


@pytest.mark.long
@pytest.mark.parametrize(
    ("module", "loaded"),
    [
        ("convoy", ""),
        ("flows.retrain", "boto3 prefect"),
        ("flows.pipeline", "boto3 mlflow prefect"),
        ("flows.candidate", "boto3 mlflow prefect torch"),
        ("tasks.training.supervisor", ""),
        ("tasks.training.torchrun", ""),
        ("tasks.training.forked_ranks", "boto3 torch torch._dynamo"),
    ],
)
def test_a_program_of_a_training_loads_only_what_it_needs(module: str, loaded: str, tmp_path: Path) -> None:
    assert set(loaded_by(f"import {module}", folder=tmp_path).split()) <= set(loaded.split())


@pytest.mark.parametrize("arguments", [["status"], ["train", "--dataset", "digits"], ["down"]])
def test_a_working_folder_that_was_removed_is_one_line(arguments: list[str]) -> None:
    code = (
        "import os, sys, tempfile; folder = tempfile.mkdtemp(); os.chdir(folder); os.rmdir(folder)\n"
        "from flows.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code, *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "convoy: the working folder was removed; change to one that exists\n"


@pytest.mark.parametrize("command", ["runs", "runs --last --id", "models", "history cats", "compare cats/1 cats/2"])
def test_a_command_that_only_reads_starts_no_server(command: str, tmp_path: Path) -> None:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "MLFLOW_", "PREFECT_"))}
    done = subprocess.run(
        [sys.executable, "-P", "-c", "from flows.cli import main; main()", *command.split()],
        cwd=tmp_path,
        env=own | {"CONVOY_HOME": "state"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"convoy: not running in {tmp_path}/state: seaweedfs, mlflow; `convoy up` starts them\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("train --epochs many", "Invalid value for '--epochs': Input should be a valid integer, unable to parse"),
        ("train --epoch 3", "No such option: --epoch (Possible options: --epochs); see `convoy train --help`"),
        ("train photos", "Got unexpected extra argument(s) (photos); see `convoy train --help`"),
        ("trian", "No such command 'trian'. Did you mean 'trial', 'train', 'retrain'; see `convoy --help`"),
        ("data shwo", "No such command 'shwo'. Did you mean 'show'; see `convoy data --help`"),
        ("promote photos", "Missing argument 'VERSION'; see `convoy promote --help`"),
        ("predict photos new/", "Missing option '--out'; see `convoy predict --help`"),
        ("train --summary", "Option '--summary' requires an argument; see `convoy --help`"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(convoy: Convoy, arguments: str, complaint: str) -> None:
    done = convoy(*arguments.split())
    assert (done.status, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.complaint.startswith(complaint)


@pytest.mark.parametrize("group", ["", "data"])
def test_a_group_of_commands_alone_shows_its_help(convoy: Convoy, group: str) -> None:
    done = convoy(*group.split())
    assert done.status == 2
    assert "Usage: convoy" in done.stdout and not done.stderr


@pytest.mark.long
def test_second_training_by_one_rank_skips_what_is_there_and_gives_the_same_weights(
    trained: Summary, program: Callable[..., Program], tmp_path: Path, settings: Settings
) -> None:
    for name in ("tasks", "cnn", "torch"):  # the user's folder holds modules with names of Convoy's packages
        (tmp_path / f"{name}.py").write_text("raise SystemExit('this is not ours')")
    config = {key: value for key, value in CONFIG.resolved().items() if key != "ranks"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    done = program("train", "--config", "config.yaml", "--ranks", "1", "--summary", "out.json").wait()
    assert done.status == 0, done.stderr
    found = Summary.model_validate_json((tmp_path / "out.json").read_bytes())
    assert found.reused == ("download", "preprocess")
    assert found.world_size == 1
    assert found.weights_sha256 == trained.weights_sha256
    assert found.accuracy == trained.accuracy
    assert found.dataset_version == trained.dataset_version
    assert found.mlflow_run_id != trained.mlflow_run_id
    assert found.model_name == trained.model_name
    assert int(found.model_version or 0) == int(trained.model_version or 0) + 1
    for alias, version in (("challenger", "2"), ("champion", "2"), ("previous", "1")):
        model = aliased(found.model_name or "", alias)
        assert model and model.version == version
    for told in (
        f"{found.accuracy:.2%}",
        found.mlflow_run_url,
        found.prefect_flow_run_url,
        "whole-flow, version 2",
    ):
        assert told and told in done.stdout
    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    assert secret not in done.stdout + done.stderr
    assert all(secret not in file.read_text() for file in (settings.runs / (found.mlflow_run_id or "")).glob("*.*l*"))


def test_runs_and_models_name_the_registered_version_with_accuracy_and_verdict(
    trained: Summary, convoy: Convoy
) -> None:
    accuracy = f"{trained.accuracy:.2%}"
    listed = convoy("runs", "--limit", "1000").stdout.splitlines()
    assert listed[0].split() == [
        *("run", "started", "status", "checkpoint", "dataset"),
        *("network", "model", "validation", "test", "verdict"),
    ]
    (row,) = (line.split() for line in listed if line.split()[0] == trained.mlflow_run_id)
    assert row[3] == "FINISHED"
    assert row[5:8] == ["digits", "convoy9", f"whole-flow/{trained.model_version}"]
    assert row[9:] == [accuracy, "passed"]
    models = convoy("models").stdout.splitlines()
    assert models[0].split() == ["model", "champion", "accuracy", "age", "versions"]
    (model,) = (line.split() for line in models if line.split()[0] == "whole-flow")
    champion, versions = aliased("whole-flow", "champion"), MlflowClient().search_model_versions("name = 'whole-flow'")
    assert champion and model[1] == champion.version
    assert (model[2], model[-1]) == (accuracy, str(len(versions)))
