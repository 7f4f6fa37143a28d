"""The form in which Prefect shows a configuration. Imports pydantic only."""

from typing import Any

from pydantic import GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from cnn.config.networks import OWN_NAME
from infra.sources.entries import CATALOGUE
from tasks.config.keys import network_names

FIRST = ("dataset", "name", "model", "epochs", "network")
"""Keys that a form begins with; the other plain keys follow, then the sections."""

LAST = ("nodes", "ray", "kubernetes")
"""Sections that a form ends with."""

INTERNAL = ("pretrained_sha256", "pretrained_mean", "pretrained_std")
"""Keys that no person sets. Deployments and scripts may still set them."""

DEPENDENT = ("flip",)
"""Keys whose default depends on another key: a form must not send the usual one as if a person had chosen it."""


class Form:
    """Turns the JSON schema of a flow's parameter into a form: `Annotated[RunConfig, Form()]`.

    The form accepts the same values as the configuration.
    """

    def __get_pydantic_json_schema__(self, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        reference = handler(core_schema)
        form = handler.resolve_ref_schema(reference)
        fields: dict[str, dict[str, Any]] = form["properties"]
        sections = {key: handler.resolve_ref_schema(field) for key, field in fields.items() if "$ref" in field}
        if hidden := {f"^{key}$": fields.pop(key) for key in INTERNAL if key in fields}:
            form["patternProperties"] = hidden
        for section in (form, *sections.values()):
            section["properties"] |= {key: _plain(key, field) for key, field in section["properties"].items()}
        if "model" in fields:
            fields["model"].pop("type")
            fields["model"]["anyOf"] = [
                {"title": "By name", "type": "string", "enum": network_names()},
                {"title": "Your own", "type": "string", "pattern": f"^{OWN_NAME}$"},
            ]
        if "dataset" in fields:
            names = ", ".join(entry.name for entry in CATALOGUE)
            fields["dataset"]["description"] += f" The catalogue has {names}."
        if "network" in fields:
            fields["network"]["description"] += ' In a form as JSON: `{"dropout": 0.2}`.'
        others = sorted(
            fields.keys() - set(FIRST), key=lambda key: (key in sections, key in LAST, [*fields].index(key))
        )
        order = [*(key for key in FIRST if key in fields), *others]
        # The database may store keys in another order, so each field has its number, too.
        form["properties"] = {key: {**fields[key], "position": number} for number, key in enumerate(order)}
        return reference


def _plain(key: str, field: dict[str, Any]) -> dict[str, Any]:
    """Returns a field that Prefect shows as one input: empty, unless it has a default of its own."""
    rest = {name: value for name, value in field.items() if name not in ("anyOf", "default")}
    match field:
        case {"$ref": _}:
            return rest  # its fields have the defaults
        case {"anyOf": [{"type": "boolean"}, {"type": "null"}]}:
            return {**rest, "enum": [True, False, None]}
        case {"anyOf": [{"enum": choices}, {"type": "null"}]}:
            return {**rest, "enum": [*choices, None]}
        case {"anyOf": [{"type": "string" | "integer" | "number"} as kind, {"type": "null"}]}:
            return {**kind, **rest}  # Prefect accepts null for a field that has a type and no default
        case {"type": "boolean"} if key in DEPENDENT:
            return {**{name: value for name, value in rest.items() if name != "type"}, "enum": [True, False]}
    return field
