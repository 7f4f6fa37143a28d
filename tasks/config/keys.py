"""Describes the keys of a configuration: sentence, default and values, from its JSON schema. Imports pydantic only."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel

from cnn.config.networks import (
    NETWORKS,
    OWN_NAME,
    TIMM,
    OwnOptions,
    TimmOptions,
    find_network,
    is_network,
    is_own,
    timm_names,
)
from cnn.networks.own import is_loaded, own_network

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
    """Returns the names of the networks that have the same options; `timm/NAME` stands for all of timm's."""
    users: dict[type[BaseModel], list[str]] = {}
    for name, network in NETWORKS.items():
        users.setdefault(network.options, []).append(name)
    users[TimmOptions].append(f"{TIMM}NAME")
    return users


def network_names() -> list[str]:
    """Returns the names of all networks, timm's last."""
    return [*NETWORKS, *(TIMM + name for name in timm_names())]


def _one_of(names: Collection[str]) -> dict[str, Any]:
    """Returns the JSON schema of the names of some networks."""
    schema = {"enum": [name for name in names if name in NETWORKS]}
    if f"{TIMM}NAME" in names:
        return {"anyOf": [schema, {"type": "string", "pattern": f"^{TIMM}[a-z0-9_]+$", "format": f"{TIMM}NAME"}]}
    return schema


def schema_of(model: type[BaseModel]) -> dict[str, Any]:
    """Returns the JSON schema (draft 2020-12) of a configuration; that of a run knows the options of each network."""
    schema = model.model_json_schema()
    if "network" in schema["properties"]:
        users = users_of_options()
        del schema["properties"]["model"]["type"]
        known = _one_of([name for names in users.values() for name in names])
        own = {"type": "string", "pattern": f"^{OWN_NAME}$", "format": "package.module:NAME"}
        schema["properties"]["model"] |= {"anyOf": [*known["anyOf"], own]}
        schema["$defs"] |= {options.__name__: options.model_json_schema() for options in users}
        schema["allOf"] = [
            {
                # A missing `model` is the default network, and matches any list of names unless it is required.
                "if": {
                    "properties": {"model": _one_of(names)},
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

    Raises:
        InputError: it is one's own, and its module was imported, but has no such network.
    """
    schema = schema_of(model)
    top, sections = list[Key](), list[Section]()
    for name, field in schema["properties"].items():
        if name == "network":
            default = schema["properties"]["model"]["default"]
            chosen = str(network) if is_network(network) else default
            sections += _sections(name, _options_schema(chosen), schema["$defs"])
        elif "$ref" in field:
            sections += _sections(name, _referred(field, schema["$defs"]), schema["$defs"])
        else:
            top.append(_key(name, field))
    yield Section("", schema["description"], tuple(top))
    yield from sections


def _options_schema(network: str) -> dict[str, Any]:
    """Returns the JSON schema of a network's options; of one's own, none are known before its module is imported."""
    if is_own(network):
        return own_network(network).schema() if is_loaded(network) else OwnOptions.model_json_schema()
    return find_network(network).options.model_json_schema()


def _sections(name: str, schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> Iterator[Section]:
    """Yields a section, and those within it."""
    fields = {f"{name}.{key}": field for key, field in schema.get("properties", {}).items()}
    keys = (_key(key, field) for key, field in fields.items() if "$ref" not in field)
    yield Section(name, schema.get("description", ""), tuple(keys))
    for key, field in fields.items():
        if "$ref" in field:
            yield from _sections(key, _referred(field, definitions), definitions)


def _referred(field: Mapping[str, Any], definitions: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = definitions[field["$ref"].rpartition("/")[2]]
    return found


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
    match field.get("type", "any value"):
        case "boolean":
            return ["true", "false"]
        case "array":
            return [f"list of {_joined(_values(field['items']))}s" if field.get("items") else "list"]
        case "string":
            return [field.get("format", "text")]
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
