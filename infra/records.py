"""The base class of immutable, typed records that are stored or passed on."""

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """An immutable record. It ignores unknown keys, which another version may write, unless `extra="forbid"` is set."""

    model_config = ConfigDict(frozen=True)
