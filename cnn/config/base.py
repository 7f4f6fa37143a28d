"""What all configuration has in common."""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Base of all configuration: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True)
