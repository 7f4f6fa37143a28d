"""The base class of all configuration."""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Immutable configuration that refuses unknown keys, and numbers that JSON lacks: infinity, and not a number."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False
    )
