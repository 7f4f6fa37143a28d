"""The forms that Prefect makes of the flows' parameters."""

from typing import Any

import pytest
from prefect.flows import Flow
from prefect.utilities.schema_tools.validation import ValidationError, validate

from cnn.config.networks import NETWORKS, timm_names
from flows.predict import predict_flow
from flows.prune import prune_flow
from flows.retrain import retrain_flow
from flows.train import train_flow
from infra.sources.entries import CATALOGUE
from tasks.config.form import INTERNAL, LAST
from tasks.config.run import RunConfig

FLOWS = (train_flow, retrain_flow, predict_flow, prune_flow)


def schema_of(flow: Flow[..., Any]) -> dict[str, Any]:
    return flow.parameters.model_dump_for_openapi()


def definition(schema: dict[str, Any], field: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = schema["definitions"][field["$ref"].rpartition("/")[2]]
    return found


def all_fields(schema: dict[str, Any], of: dict[str, Any], path: str = "") -> dict[str, dict[str, Any]]:
    """Returns the fields of a form, those of sections included, with the sentence that the browser shows."""
    found = {}
    for key, field in of["properties"].items():
        name = f"{path}{key}"
        found[name] = (definition(schema, field) | field) if "$ref" in field else field
        if "$ref" in field:
            found |= all_fields(schema, found[name], f"{name}.")
    return found


def sent(schema: dict[str, Any], of: dict[str, Any]) -> dict[str, Any]:
    """Returns what a browser sends if no field is touched: the defaults of the fields that have one."""
    values = {}
    for key, field in of["properties"].items():
        if "$ref" in field:
            values[key] = sent(schema, definition(schema, field))
        elif "default" in field:
            values[key] = field["default"]
    return values


@pytest.mark.parametrize("flow", [train_flow, retrain_flow])
def test_the_form_of_a_training_begins_with_what_people_change_and_ends_with_sections(flow: Flow[..., Any]) -> None:
    schema = schema_of(flow)
    assert next(iter(schema["properties"])) == "config"
    fields = definition(schema, schema["properties"]["config"])["properties"]
    assert sorted(fields, key=lambda key: fields[key]["position"]) == [*fields]
    assert [*fields][:5] == ["dataset", "name", "model", "epochs", "network"]
    sections = [key for key, field in fields.items() if "$ref" in field]
    assert [*fields][-len(sections) :] == sections and tuple(sections[-3:]) == LAST
    assert fields.keys() == RunConfig.model_fields.keys() - {*INTERNAL}


@pytest.mark.parametrize("flow", FLOWS)
def test_every_field_has_a_sentence_and_no_field_shows_internals_or_types(flow: Flow[..., Any]) -> None:
    schema = schema_of(flow)
    fields = all_fields(schema, schema)
    for name, field in fields.items():
        assert field.get("description", "").rstrip().endswith((".", ")")), name
        assert name in ("config.data.shard_bytes", "config.model") or "anyOf" not in field, name
    assert not fields.keys() & {"resume", "inputs_file", *(f"config.{key}" for key in INTERNAL)}


def test_what_has_few_values_is_a_choice() -> None:
    schema = schema_of(retrain_flow)
    fields = all_fields(schema, schema)
    by_name, own = fields["config.model"]["anyOf"]
    assert by_name["enum"] == [*NETWORKS, *(f"timm/{name}" for name in timm_names())]
    assert own["title"] == "Your own"
    assert fields["config.optimizer"]["enum"] == ["sgd", "adam", "adamw", "muon"]
    assert fields["config.promote"]["enum"] == [True, False, None]
    assert fields["config.data.channels"]["enum"] == [1, 3, None]
    assert definition(schema, fields["refresh"]["items"])["enum"] == ["download", "preprocess"]
    for entry in CATALOGUE:
        assert entry.name in fields["config.dataset"]["description"]


@pytest.mark.parametrize("dataset", ["digits", "cifar10", "photos/"])
def test_a_form_that_nobody_has_touched_trains_as_the_command_does(dataset: str) -> None:
    """Digits must not be mirrored, so the form must not send the usual `augment.flip`."""
    schema = schema_of(train_flow)
    values = sent(schema, definition(schema, schema["properties"]["config"]))
    assert RunConfig.model_validate(values | {"dataset": dataset}) == RunConfig(dataset=dataset)


@pytest.mark.long
def test_the_form_accepts_all_that_the_configuration_accepts_and_refuses_typing_errors() -> None:
    schema = schema_of(train_flow)

    def check(config: dict[str, Any], **more: object) -> None:  # as the server does for every request
        validate({"config": config, **more}, schema, raise_on_error=True, ignore_required=True)

    check(RunConfig().resolved())  # with null for what is unset
    check(
        RunConfig(
            model="notes", name="cats", ranks=2, promote=False, pretrained="a", pretrained_sha256="0" * 64
        ).resolved()
    )
    check(RunConfig(model="timm/resnet18d", network={"drop_path_rate": 0.1}).resolved())
    check({"model": "nets.small:Small", "network": {"width": 3, "kernels": [1, 2]}})
    check({"data": {"channels": 3, "keep_raw": True, "shard_bytes": "8MiB"}, "augment": {"flip": True}})
    check({}, refresh=["download"], resume="0123abcd")
    for wrong in (
        {"epoch": 3},
        {"epochs": "three"},
        {"epochs": 0},
        {"model": "resnet"},
        {"model": "timm/resnet"},
        {"model": "nets/small.py:Small"},
        {"data": {"channels": 2}},
    ):
        with pytest.raises(ValidationError):
            check(wrong)
    with pytest.raises(ValidationError):
        check({}, refresh=["train"])
