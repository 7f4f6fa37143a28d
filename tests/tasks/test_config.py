"""The configuration of a run: files, settings, options, and messages about mistakes."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from jsonschema import Draft202012Validator
from pydantic import ValidationError

from cnn.config.base import Config
from cnn.config.networks import find_network
from cnn.config.training import TrainConfig
from infra.errors import UsageError
from tasks.config.deployment import ProjectConfig
from tasks.config.explain import explained, reference_page
from tasks.config.keys import schema_of, sections_of, users_of_options
from tasks.config.retention import RetentionConfig
from tasks.config.run import RunConfig, load_config, recipes

EACH_KIND = [names[0] for names in users_of_options().values()]
"""One network of each kind of options."""


def refusal(*settings: str, **options: Any) -> str:
    with pytest.raises(UsageError) as refused:
        load_config(None, settings, options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_option_wins_over_setting_over_file_over_default(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("epochs: 3\nseed: 3\nlr: 0.3\naugment:\n  shift: 3\n  cutout: 3\n")
    config = load_config(file, ["epochs=4", "seed=4", "augment.shift=4"], {"epochs": 5, "model": None})
    assert (config.epochs, config.seed, config.lr) == (5, 4, 0.3)
    assert (config.augment.shift, config.augment.cutout) == (4, 3)
    assert config.batch_size == RunConfig().batch_size


def test_later_setting_wins_and_values_are_yaml() -> None:
    config = load_config(
        None,
        ["model=notes", "network.hidden=[64, 32]", "lr=1e-2", "lr=0.02", "name=null", "augment.flip=false"],
    )
    assert config.network.model_dump()["hidden"] == (64, 32)
    assert (config.lr, config.name, config.augment.flip) == (0.02, None, False)


@pytest.mark.parametrize("recipe", recipes())
def test_every_recipe_is_a_configuration_that_all_else_builds_on(recipe: str, tmp_path: Path) -> None:
    config = load_config(None, recipe=recipe)
    assert config != RunConfig()
    file = tmp_path / "config.yaml"
    file.write_text("augment:\n  cutout: 3\n")
    changed = load_config(file, ["lr=0.3"], {"epochs": 5}, recipe=recipe)
    assert (changed.lr, changed.epochs, changed.augment.cutout) == (0.3, 5, 3)
    unset = {"lr", "epochs", "augment"}
    assert changed.model_dump(exclude=unset) == config.model_dump(exclude=unset)


def test_unknown_recipe_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="unknown recipe 'fashion-95'; did you mean 'fashion-94'"):
        load_config(None, recipe="fashion-95")


def test_empty_file_is_the_default_configuration(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_config(tmp_path / "empty.yaml") == load_config(None) == RunConfig()


def changed_options(network: str) -> dict[str, Any]:
    """Returns an option of a network with another value than its default, if it has options."""
    options = find_network(network).options
    for key, field in options.model_fields.items():
        for value in (0.5, 8, [8], *get_args(field.annotation)):
            with suppress(ValidationError):
                if options.model_validate({key: value}) != options():
                    return {key: value}
    assert not options.model_fields
    return {}


@pytest.mark.parametrize("network", [*EACH_KIND, "timm/resnet18d"])
def test_resolved_configuration_is_complete_and_gives_itself_again(network: str) -> None:
    config = load_config(None, [f"model={network}", f"network={json.dumps(changed_options(network))}"])
    resolved = config.resolved()
    assert resolved["network"].keys() == find_network(network).options.model_fields.keys()
    again = RunConfig.model_validate(yaml.safe_load(yaml.safe_dump(resolved)))
    assert again == config
    assert again.resolved() == resolved


@pytest.mark.parametrize("images, size", [(54_000, 256), (5_120, 256), (5_119, 128), (1_372, 64), (40, 8), (3, 8)])
def test_batch_size_that_nobody_asked_for_suits_the_training_split(images: int, size: int) -> None:
    assert load_config(None).for_images(images).training().batch_size == size
    assert load_config(None, ["batch_size=12"]).for_images(images).batch_size == 12
    assert load_config(None, ["lanes=256"]).for_images(images).batch_size == 512


def test_training_part_has_neither_ranks_nor_name_nor_data() -> None:
    config = load_config(None, ["ranks=2", "name=other", "data.limit=9", "lr=0.5", "batch_size=64"])
    training = config.training()
    assert type(training) is TrainConfig
    assert training == load_config(None, ["lr=0.5", "batch_size=64"]).training()
    assert training.network == config.network


@pytest.mark.parametrize("dataset, flip", [("digits", False), ("mnist", False), ("fashion-mnist", True), ("x/", True)])
def test_images_with_a_left_and_a_right_are_not_mirrored_unless_asked_for(dataset: str, flip: bool) -> None:
    assert load_config(None, ["augment.shift=1"], {"dataset": dataset}).augment.flip is flip
    assert load_config(None, ["augment.flip=true"], {"dataset": dataset}).augment.flip is True


@pytest.mark.parametrize(
    "setting, nearest",
    [
        ("epoch=3", "epochs"),
        ("batchsize=64", "batch_size"),
        ("augment.shfit=1", "augment.shift"),
        ("shift=1", "augment.shift"),
        ("data.imagesize=32", "data.image_size"),
        ("network.widht=8", "network.width"),
        ("width=8", "network.width"),
        ("limit=8", "data.limit"),
    ],
)
def test_unknown_key_is_refused_with_the_nearest_that_there_is(setting: str, nearest: str) -> None:
    complaint = refusal(setting)
    assert complaint == f"unknown key {setting.partition('=')[0]!r}; did you mean {nearest!r}?"


@pytest.mark.parametrize(
    "model, setting, meant",
    [
        ("convoy9", "network.channels=3", "channels"),
        ("convoy9", "network.hiden=[8]", "hidden"),
        ("convoy9", "hidden=[8]", "hidden"),
        ("resnet18", "network.width=8", "width"),
        ("notes", "stem=small", "stem"),
    ],
)
def test_an_option_of_another_network_is_said_to_be_so(model: str, setting: str, meant: str) -> None:
    first, *others = (
        name for options, names in users_of_options().items() for name in names if meant in options.model_fields
    )
    more = f" and {len(others)} more" if others else ""
    assert refusal(setting, model=model) == (
        f"unknown key {setting.partition('=')[0]!r}; network.{meant} is a key of network {first}{more} "
        f"(--model {first}); this run uses {model}"
    )


@pytest.mark.parametrize(
    "setting, answer",
    [
        ("foo=1", "`convoy config --explain` lists all keys"),
        ("data_gate.foo=1", "`convoy config --explain` lists all keys"),
        ("checkpoints.foo=1", "there are checkpoints.every, checkpoints.keep, checkpoints.patience"),
    ],
)
def test_unknown_key_is_not_answered_with_one_that_only_looks_alike(setting: str, answer: str) -> None:
    assert refusal(setting) == f"unknown key {setting.partition('=')[0]!r}; {answer}"


@pytest.mark.parametrize(
    "model, complaint",
    {
        "resnet19": "did you mean 'resnet18'?",
        "timm/resnet18x": "did you mean 'timm/resnet18'?",
        "resnet18d": "did you mean 'timm/resnet18d'?",
        "timm/hf-hub:timm/resnet18": "unknown network",
        "inception_v3": "inception_v3 has more than one output in training",
        "xyzzy": "choose notes, convoy9, efficientnet_lite0, one of torchvision's, timm/NAME",
    }.items(),
)
def test_a_wrong_network_is_answered_with_the_nearest(model: str, complaint: str) -> None:
    assert complaint in refusal(model=model)


def test_a_network_that_is_no_name_is_refused() -> None:
    assert refusal("model=[a]", "foo=1").startswith("model: ")


@pytest.mark.parametrize("network", EACH_KIND)
def test_explained_configuration_is_the_same_with_a_sentence_for_each_key(network: str) -> None:
    settings = [
        f"model={network}",
        f"network={json.dumps(changed_options(network))}",
        "pretrained='a: b, c # é'",
        "lr=1e-5",
    ]
    config = load_config(None, settings)
    text = explained(config)
    assert yaml.safe_load(text) == config.resolved()
    assert "# Default: 0.2; values: 0 < number ≤ 100\nlr: " in text
    assert "  # Default: fail; values: off, warn or fail\n  leakage: fail" in text
    assert all(len(line) <= 104 for line in text.splitlines() if line.lstrip().startswith("#"))


@pytest.mark.parametrize("model", [RunConfig, ProjectConfig, RetentionConfig])
@pytest.mark.parametrize("network", EACH_KIND)
def test_every_key_has_a_sentence_and_its_values(model: type[Config], network: str) -> None:
    keys = [key for section in sections_of(model, network) for key in section.keys]
    assert [key.name for key in keys if not (key.text.endswith(".") and key.values)] == []
    assert len(keys) == len({key.name for key in keys})


def test_the_page_of_all_keys_is_current() -> None:
    page = Path(__file__).parents[2] / "flows" / "configuration.md"
    command = ".venv/bin/python -m tasks.config.explain > flows/configuration.md"
    assert page.read_text() == reference_page() + "\n", f"run {command}"


@pytest.mark.parametrize("network", EACH_KIND)
def test_schema_takes_what_a_configuration_may_hold(network: str) -> None:
    schema = schema_of(RunConfig)
    Draft202012Validator.check_schema(schema)
    validator = Draft202012Validator(schema)
    assert list(validator.iter_errors(load_config(None, [f"model={network}"]).resolved())) == []
    options = {"model": network, "network": changed_options(network), "data": {"shard_bytes": "8MiB"}}
    assert list(validator.iter_errors(options)) == []
    for other in [*EACH_KIND, "timm/resnet18d"]:
        taken = changed_options(network).keys() <= find_network(other).options.model_fields.keys()
        assert (list(validator.iter_errors({"model": other, "network": changed_options(network)})) == []) is taken


@pytest.mark.parametrize(
    "values",
    [
        {"lr": 0},
        {"foo": 1},
        {"augment": {"shfit": 1}},
        {"model": "convoy8"},
        {"model": "timm/hf-hub:x"},
        {"network": {"hidden": [8]}},
        {"model": "timm/resnet18d", "network": {"hidden": [8]}},
    ],
)
def test_schema_refuses_what_the_configuration_refuses(values: dict[str, Any]) -> None:
    assert list(Draft202012Validator(schema_of(RunConfig)).iter_errors(values)) != []
    with pytest.raises(ValidationError):
        RunConfig.model_validate(values)


def test_a_configuration_that_is_too_large_for_prefect_is_refused() -> None:
    assert refusal(f"dataset={'x' * 200_000}").startswith("dataset: 200,002 characters")


@pytest.mark.parametrize(
    "setting, names",
    [
        ("lr=0", ["lr", "greater than 0", "given: 0"]),
        ("lr=.nan", ["lr"]),
        ("clip_norm=.inf", ["clip_norm", "finite number"]),
        ("checkpoints.every=.inf", ["checkpoints.every", "finite number"]),
        ("data_gate.max_imbalance=.inf", ["data_gate.max_imbalance", "finite number"]),
        ("approval_patience=1e12", ["approval_patience", "315360000"]),
        ("epochs=1.5", ["epochs", "given: 1.5"]),
        ("batch_size=2", ["batch_size", "nearest is 8"]),
        ("batch_size=130", ["nearest is 128"]),
        ("lanes=3", ["nearest are 2 and 4"]),
        ("ranks=8", ["8 ranks cannot share 4 lanes", "nearest is 4"]),
        ("optimizer=adamax", ["optimizer", "'adamw'"]),
        ("network.width=6", ["network.width", "multiple of 4"]),
        ("network.kernel_sizes=[3]", ["network.kernel_sizes"]),
        ("augment=3", ["augment"]),
        ("data.val_fraction=0.5", ["data.val_fraction", "less than 0.5"]),
        ("name=a:b", ["name", "':'"]),
        ("name=''", ["name", "empty"]),
    ],
)
def test_value_that_cannot_be_used_is_named_with_what_could(setting: str, names: list[str]) -> None:
    complaint = refusal(setting)
    assert all(name in complaint for name in names), complaint


def test_all_mistakes_are_named_at_once() -> None:
    complaint = refusal("lr=0", "epoch=1", "seed=-1")
    assert all(name in complaint for name in ("lr: ", "'epochs'", "seed: "))


@pytest.mark.parametrize("setting", ["lr", "lr=[", "lr.peak=1"])
def test_setting_that_is_no_setting_is_refused(setting: str) -> None:
    values = ["lr=0.1", setting] if setting.startswith("lr.") else [setting]
    assert f"--set {setting}" in refusal(*values)


@pytest.mark.long
@pytest.mark.parametrize("value", ["!!int x", "!!timestamp x", "[" * 5000])
def test_a_value_that_yaml_cannot_read_is_refused(value: str, tmp_path: Path) -> None:
    assert "the value is not valid YAML" in refusal(f"lr={value}")
    file = tmp_path / "config.yaml"
    file.write_text(f"lr: {value}\n")
    with pytest.raises(UsageError, match="is not valid YAML"):
        load_config(file)


@pytest.mark.parametrize(
    "text, values",
    {
        "epochs: 010": {"epochs": 10},
        "epochs: 09": {"epochs": 9},
        "lr: 1e-3": {"lr": 0.001},
        "seed: 0x10": {"seed": 16},
        "name: 2024-01-01": {"name": "2024-01-01"},
        "augment: {flip: no, shift: +1}": {"augment": {"flip": False, "shift": 1}},
        "ema: .5": {"ema": 0.5},
    }.items(),
)
def test_plain_yaml_values_mean_what_they_look_like(tmp_path: Path, text: str, values: dict[str, Any]) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    read = load_config(file).resolved()
    assert {key: value for key, value in values.items() if not isinstance(value, dict)}.items() <= read.items()
    assert values.get("augment", {}).items() <= read["augment"].items()


@pytest.mark.parametrize(
    "text, reason",
    {
        "epochs: 3\nlr: 0.1\nepochs: 4\n": "epochs is there twice (lines 1 and 3)",
        "augment:\n  shift: 1\naugment:\n  cutout: 3\n": "augment is there twice (lines 1 and 3)",
        "augment: {shift: 1, shift: 2}\n": "shift is there twice (lines 1 and 1)",
        "epochs: 12:30\n": "epochs: input should be a valid integer",
        "data: {slices: camera}\n": "data.slices: give a list, such as ['camera']",
        "name: 123\n": "put it into quotes",
        "network: &a {width: *a}\n": "config.yaml is not valid YAML",
        "epochs: " + 5000 * "[": "config.yaml is not valid YAML",
        "epochs: 1\n---\nepochs: 2\n": "not valid YAML (line 2)",
    }.items(),
)
def test_a_file_that_does_not_mean_one_thing_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as refused:
        load_config(file)
    assert reason in str(refused.value) and "\n" not in str(refused.value)


def test_a_refusal_does_not_repeat_a_value_of_any_size(tmp_path: Path) -> None:
    lists = "".join(f"k{n + 1}: &k{n + 1} [{', '.join(8 * [f'*k{n}'])}]\n" for n in range(6))
    file = tmp_path / "config.yaml"
    file.write_text(f"k0: &k0 [x, x, x, x]\n{lists}network: [*k6, *k6]\nseed: {500 * 'y'}\n")
    with pytest.raises(UsageError) as refused:
        load_config(file)
    assert all(len(part) < 4000 for part in str(refused.value).split("; "))


@pytest.mark.parametrize("dataset", ["", "  ", "https://host:port/a.zip", "http://[::1/a.zip"])
def test_what_names_no_data_set_is_refused(dataset: str) -> None:
    assert refusal(dataset=dataset).startswith("dataset: ")


def test_a_scheme_may_be_written_in_capitals() -> None:
    assert load_config(None, options={"dataset": "S3://Bucket/Photos"}).dataset == "s3://Bucket/Photos"
    assert "password" in refusal(dataset="HTTPS://host/a.zip?token=secret")
