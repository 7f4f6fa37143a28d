"""The base of what is written down or handed on: values with names and types, which never change."""

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """A value that never changes. It reads what another version wrote: a class that refuses unknown keys says so itself
    (`extra="forbid"`).
    """

    model_config = ConfigDict(frozen=True)
