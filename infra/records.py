"""The base class of immutable, typed records that are stored or passed on."""

from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError


class Record(BaseModel):
    """An immutable record. It ignores unknown keys, which another version may write, unless `extra="forbid"` is set."""

    model_config = ConfigDict(frozen=True)

    @classmethod
    def from_file(cls, path: Path) -> Self | None:
        """Returns the record in a JSON file, or None if the file is missing or cannot be read as one."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):
            return None
