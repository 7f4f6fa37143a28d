"""The base of what is written down or handed on: values with names and types, which never change."""

from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError


class Record(BaseModel):
    """A value that never changes. It reads what another version wrote: a class that refuses unknown keys says so itself
    (`extra="forbid"`).
    """

    model_config = ConfigDict(frozen=True)

    @classmethod
    def from_file(cls, path: Path) -> Self | None:
        """Returns the record in a JSON file, or None if the file is missing or cannot be read as one."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):
            return None
