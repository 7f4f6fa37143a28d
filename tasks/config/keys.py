"""Describes the keys of a configuration: sentence, default and values, from its JSON schema. Imports pydantic only."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel

from cnn.config.networks import NETWORKS

LOWER = {"minimum": ("≤", "≥"), "exclusiveMinimum": ("<", ">")}
"""Bounds of JSON schema, with their signs between bound and number, and between number and bound."""

UPPER = {"maximum": "≤", "exclusiveMaximum": "<"}


class Key(NamedTuple):
    """A key of a configuration."""

    name: str
    """In dotted form, as in `--set`."""

    text: str
    default: Any
    """As JSON."""

    values: str
    """The values that it may have, in words."""


class Section(NamedTuple):
    """The keys of one section; those at the top level have the section named by an empty text."""

    name: str
    text: str
    keys: tuple[Key, ...]


def users_of_options() -> dict[type[BaseModel], list[str]]:
    """Returns the names of the networks that have the same options."""
    users: dict[type[BaseModel], list[str]] = {}
    for name, network in NETWORKS.items():
        users.setdefault(network.options, []).append(name)
    return users


def schema_of(model: type[BaseModel]) -> dict[str, Any]:
    """Returns the JSON schema (draft 2020-12) of a configuration; that of a run knows the options of each network."""
    schema = model.model_json_schema()
    if "network" in schema["properties"]:
        schema["properties"]["model"]["enum"] = list(NETWORKS)
        users = users_of_options()
        schema["$defs"] |= {options.__name__: options.model_json_schema() for options in users}
        schema["allOf"] = [
            {
                # A missing `model` is the default network, and matches any list of names unless it is required.
                "if": {
                    "properties": {"model": {"enum": names}},
                    "required": [] if schema["properties"]["model"]["default"] in names else ["model"],
                },
                "then": {"properties": {"network": {"$ref": f"#/$defs/{options.__name__}"}}},
            }
            for options, names in users.items()
        ]
    return schema


def sections_of(model: type[BaseModel], network: object = None) -> Iterator[Section]:
    """Yields the keys of a configuration: those at the top level, then each section.

    Args:
        network: the name of the network whose options are the section `network`; by default, and if there is no such
            network, the default one.
    """
    schema = schema_of(model)
    top, sections = [], []
    for name, field in schema["properties"].items():
        if name == "network":
            default = schema["properties"]["model"]["default"]
            options = NETWORKS[network if isinstance(network, str) and network in NETWORKS else default].options
            sections.append(_section(name, schema["$defs"][options.__name__]))
        elif "$ref" in field:
            sections.append(_section(name, schema["$defs"][field["$ref"].rpartition("/")[2]]))
        else:
            top.append(_key(name, field))
    yield Section("", schema["description"], tuple(top))
    yield from sections


def _section(name: str, schema: Mapping[str, Any]) -> Section:
    keys = (_key(f"{name}.{key}", field) for key, field in schema.get("properties", {}).items())
    return Section(name, schema.get("description", ""), tuple(keys))


def _key(name: str, field: Mapping[str, Any]) -> Key:
    return Key(name, " ".join(field.get("description", "").split()), field.get("default"), _joined(_values(field)))


def _joined(names: list[str]) -> str:
    """Returns names as `a, b or c`."""
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _values(field: Mapping[str, Any]) -> list[str]:
    """Returns the alternatives of a field's schema, in words."""
    if "anyOf" in field:
        return [value for each in field["anyOf"] for value in _values(each)]
    if "enum" in field:
        return list(map(str, field["enum"]))
    match field["type"]:
        case "boolean":
            return ["true", "false"]
        case "array":
            return [f"list of {_joined(_values(field['items']))}s"]
        case "string":
            return ["path" if field.get("format") == "path" else "text"]
        case "integer" | "number":
            return [_range(field)]
        case kind:
            return [kind]


def _range(field: Mapping[str, Any]) -> str:
    """Returns the limits of a number: `integer ≥ 1`, or `0 < number ≤ 100`."""
    text = str(field["type"])
    above = next((f" {sign} {field[bound]}" for bound, sign in UPPER.items() if bound in field), "")
    for bound, (before, after) in LOWER.items():
        if bound in field:
            text = f"{field[bound]} {before} {text}" if above else f"{text} {after} {field[bound]}"
    multiple = f", a multiple of {field['multipleOf']}" if "multipleOf" in field else ""
    return f"{text}{above}{multiple}"
