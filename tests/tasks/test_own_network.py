"""A network of one's own in configurations, manifests, ranks and nodes, and in the process that tries a version."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from cnn.config.training import TrainConfig
from cnn.errors import InputError
from cnn.networks.own import network_files
from infra.errors import UsageError
from tasks.config.deployment import load_project
from tasks.config.explain import explained
from tasks.config.keys import schema_of
from tasks.config.run import CheckpointConfig, RunConfig, load_config, with_network_options
from tasks.data.dataset import DatasetRef
from tasks.release import retrain_decision
from tasks.release.serving.fresh_process import Hide
from tasks.training.nodes.agent import Membership, Node
from tasks.training.platform import code_inputs, differences, this_platform, weight_files
from tasks.training.protocol.board import Instruction
from tasks.training.protocol.job import Job, JobFolder
from tasks.training.rank import check_code
from tasks.training.runs import tracked_run
from tasks.training.runs.run_record import RunManifest, config_inputs, inputs_of
from tests.own_project import EXAMPLE, write

DATASET = DatasetRef(name="digits", version="0" * 64, reused=False)
MODEL = "nets.small:Small"


@pytest.fixture
def own(project: Path) -> Path:
    write(project, {"nets/small.py": EXAMPLE})
    return project


def read(*settings: str) -> RunConfig:
    return with_network_options(load_config(None, [f"model={MODEL}", "batch_size=64", *settings]))


def test_defaults_of_the_signature_become_part_of_the_configuration(own: Path) -> None:
    config = read("network.width=4")
    assert config.resolved()["network"] == {"width": 4, "dropout": 0.0}
    assert with_network_options(RunConfig.model_validate(config.model_dump(exclude_unset=True))) == config
    assert RunConfig.model_validate_json(config.model_dump_json()) == config
    assert config.training().network == config.network
    assert read("network.width=4", "network.dropout=0.0") == config
    assert with_network_options(RunConfig()) == RunConfig()
    project = with_network_options(load_project(None, [f"model={MODEL}"])).run  # that sets no option
    assert project.resolved()["network"] == {"width": 16, "dropout": 0.0}
    assert yaml.safe_load(explained(project)) == project.resolved()


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("network.widht=4", "unknown key 'network.widht'; did you mean 'network.width'?"),
        ("network.xyzzy=4", "unknown key 'network.xyzzy'; there are network.width, network.dropout"),
        (
            "network.hidden=[4]",
            "unknown key 'network.hidden'; network.hidden is a key of network notes (--model notes); this run uses "
            + MODEL,
        ),
        (
            "network.width=wide",
            "network.width: input should be a valid integer, unable to parse string as an integer (given: 'wide')",
        ),
        ("network.dropout=.inf", "network: dropout: give a finite number, a text, or a list of them"),
    ],
)
def test_option_that_does_not_fit_is_refused_in_one_line(own: Path, setting: str, complaint: str) -> None:
    with pytest.raises(UsageError) as refused:
        read(setting)
    assert str(refused.value) == complaint


def test_option_without_a_default_is_missed(own: Path) -> None:
    write(own, {"nets/deep.py": "def net(channels, image_size, classes, depth: int, width=3): ...\n"})
    with pytest.raises(UsageError) as refused:
        with_network_options(load_config(None, ["model=nets.deep:net"]))
    assert str(refused.value) == "network.depth: field required"


def test_explained_configuration_and_schema_take_the_options(own: Path) -> None:
    config = read("network.width=4")
    text = explained(config)
    assert yaml.safe_load(text) == config.resolved()
    assert f"# Options of `{MODEL}`, by its signature (`network.*`).\nnetwork:\n" in text
    assert "  # Default: 16; values: integer\n  width: 4\n" in text
    assert list(Draft202012Validator(schema_of(RunConfig)).iter_errors(config.resolved())) == []


def test_manifests_of_other_runs_stay_as_they_are() -> None:
    """Else no earlier run could be resumed, and each model would be trained again."""
    config = RunConfig(batch_size=64)
    manifest = manifest_of(config, {})
    assert "network_files" not in manifest.model_dump()
    assert inputs_of(config, DATASET)["code_digest"] == code_inputs()["code_digest"] == manifest.code_digest
    assert RunManifest.model_validate_json(manifest.model_dump_json()) == manifest


def manifest_of(config: RunConfig, files: dict[str, str]) -> RunManifest:
    platform = this_platform(files)
    return RunManifest(**platform.model_dump(), dataset_version=DATASET.version, config=config_inputs(config))


@pytest.mark.long
def test_files_of_the_network_are_code_that_a_resume_and_a_retraining_name(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = read()
    files = network_files(MODEL)
    inputs = inputs_of(config, DATASET)
    assert inputs["network_files"] == files and [*files] == ["nets/small.py"]
    assert inputs["code_digest"] != code_inputs()["code_digest"]
    earlier, same = manifest_of(config, {"nets/small.py": "1" * 64}), manifest_of(config, files)
    assert inputs["code_digest"] == same.code_digest != earlier.code_digest
    with pytest.raises(UsageError, match=f"network_files.nets/small.py was {'1' * 64}, is {files['nets/small.py']}"):
        tracked_run._check_equal("f00d", earlier, same)

    champion: Any = SimpleNamespace(name="m", version="1", run_id="f00d", address="m/1")
    standing: Any = SimpleNamespace(version=champion, note=None, entries=())
    monkeypatch.setattr(retrain_decision, "search_versions", lambda **_: [])
    for record, why in (
        (earlier, "changed since the champion, version 1: code (nets/small.py)"),
        (same, "nothing has changed since the champion, version 1"),
    ):
        found = SimpleNamespace(config=config, manifest=record)
        monkeypatch.setattr(retrain_decision, "read_record", lambda _, found=found: found)
        decided = retrain_decision._decide(None, "m", config, DATASET, standing, force=False)  # type: ignore[arg-type]
        assert decided == (record is earlier, why, None)


def job(files: dict[str, str]) -> Job:
    return Job(
        run_id="f00d",
        config=TrainConfig(model=MODEL),
        dataset_version="0" * 64,
        world_size=2,
        manifest_digest="",
        code_digest=this_platform(files).code_digest,
        network_files=files,
        checkpoints=CheckpointConfig(),
        restarts=0,
    )


def test_a_rank_refuses_files_that_have_changed_since_the_training_began(own: Path) -> None:
    write(own, {"nets/small.py": f"from nets import extra\n{EXAMPLE}", "nets/extra.py": ""})
    files = network_files(MODEL)
    check_code(job(files))
    with pytest.raises(InputError) as refused:
        check_code(job({"nets/small.py": "1" * 64, "nets/gone.py": "2" * 64}))
    changed = "nets/extra.py, nets/gone.py, nets/small.py changed after this training had begun"
    assert str(refused.value).startswith(f"{MODEL}: {changed}; ")


def test_a_node_reports_the_digests_of_its_own_files_without_importing_them(own: Path) -> None:
    (own / "nets/small.py").write_text("raise SystemExit\n")
    node = Node(name="node", address="127.0.0.1", interface="lo", slots=1)
    asked = {"nets/small.py": "1" * 64, "nets/gone.py": "2" * 64}
    board: Any = None
    member = Membership(node, board, job(asked), JobFolder(own), print)
    reported = member._report.platform
    assert reported.network_files["nets/gone.py"] == "missing"
    differing = differences(this_platform(asked).model_dump(), reported.model_dump())
    names = [each.partition(" was ")[0] for each in differing]
    assert names == ["code_digest", "network_files.nets/gone.py", "network_files.nets/small.py"]
    assert "nets" not in sys.modules


def test_a_node_reports_its_code_anew_for_each_start_of_ranks(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its agent goes on for days, while its ranks load what is on disk."""
    monkeypatch.setattr("tasks.training.nodes.agent.end_descendants", lambda _: None)  # they are the test session's
    node = Node(name="node", address="127.0.0.1", interface="lo", slots=1)
    files = network_files(MODEL)
    board: Any = None
    member = Membership(node, board, job(files), JobFolder(own), print)
    first = member._report.platform
    assert first == this_platform(files)
    (own / "nets/small.py").write_text(f"{EXAMPLE}CHANGED = 1\n")
    member._follow(Instruction(beat=1, generation="a"), leaving=False)
    assert first.network_files != member._report.platform.network_files
    (own / "nets/small.py").write_text(EXAMPLE)
    monkeypatch.setattr("tasks.training.platform.weight_files", lambda: weight_files()[1:])  # one file fewer
    member._follow(Instruction(beat=2, generation="b"), leaving=False)
    upgraded = member._report.platform
    assert upgraded.network_files == files and upgraded.code_digest != first.code_digest


def test_the_process_that_tries_a_version_finds_no_module_that_is_hidden(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(own))
    monkeypatch.setattr(sys, "meta_path", [Hide(["nets"]), *sys.meta_path])
    with pytest.raises(ModuleNotFoundError, match="the model needs nets, which its users do not have"):
        import nets.small  # type: ignore[import-not-found]  # noqa: F401
    import colorsys  # noqa: F401  # others are found
