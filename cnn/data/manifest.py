"""The manifest of a dataset version: its shards, their content, and the report on its source.

It contains nothing about the machine or the time, so equal data have equal manifests. The dataset version is the
SHA-256 of the manifest's bytes.
"""

import hashlib
import json
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from cnn.config.preprocessing import Encoding, Resize
from cnn.data.splits import Split
from cnn.errors import InputError


class Record(BaseModel):
    """An immutable value; subclasses that refuse unknown keys say so (`extra="forbid"`)."""

    model_config = ConfigDict(frozen=True)


class Shard(Record, extra="forbid"):
    """One safetensors file of packed images, all of one split."""

    sha256: str
    """Digest of the file, which is named `<sha256>.safetensors`."""

    count: int
    """Images in the shard."""

    bytes: int
    """Size of the file."""


class SplitInfo(Record, extra="forbid"):
    """One split of the dataset."""

    count: int
    class_counts: tuple[int, ...]
    """Images of each class, in the order of the manifest's `classes`."""

    shards: tuple[Shard, ...]
    """In reading order."""


class Unreadable(Record, extra="forbid"):
    """An image that could not be decoded and was left out."""

    name: str
    reason: str


class Spread(Record, extra="forbid"):
    """Smallest, median and largest value over all images."""

    min: int
    median: int
    max: int


class Losses(Record, extra="forbid"):
    """Counts of files in a class folder."""

    images: int
    left_out: int
    """Files whose names are not those of images, or that cannot be read."""


class SourceReport(Record, extra="forbid"):
    """Statistics of the source, found by preprocessing."""

    images: int
    """Images in the source."""

    packed: int
    """Images in the shards; the others were unreadable, or left out by the limit."""

    unreadable: int
    unreadable_examples: tuple[Unreadable, ...]
    """The first unreadable images."""

    duplicates: int
    """Images whose content equals that of an earlier image."""

    width: Spread
    height: Spread
    modes: dict[str, int]
    """Number of images per Pillow mode (`L`, `RGB`, `P`, ...), before conversion."""

    warnings: tuple[str, ...]
    left_out: dict[str, Losses] = {}
    """The classes from which files were left out."""


class Manifest(Record, extra="forbid"):
    """A dataset version."""

    format: Literal[1] = 1
    """Version of this layout."""

    classes: tuple[str, ...]
    """Class names; a label is a position in this tuple."""

    channels: int
    image_size: int
    """Height and width in pixels."""

    resize: Resize = "crop"
    """How rectangles became squares."""

    splits: dict[Split, SplitInfo]

    mean: tuple[float, ...]
    std: tuple[float, ...]
    """Per channel of the training split, on the scale 0..1; likewise `mean`."""

    encoding: Encoding = "raw"
    """Storage of images in the shards; see `cnn.data.shard_writer`."""

    report: SourceReport

    def to_bytes(self) -> bytes:
        """Returns canonical JSON: sorted keys, no spaces, UTF-8."""
        # Without these keys, versions keep the digest that they had before the keys existed.
        content = self.model_dump(mode="json")
        if self.encoding == "raw":
            del content["encoding"]
        if self.resize == "crop":
            del content["resize"]
        if not self.report.left_out:
            del content["report"]["left_out"]
        return canonical_json(content)

    @classmethod
    def from_bytes(cls, data: bytes) -> "Manifest":
        """Parses a manifest; raises InputError if this version of the code cannot read it."""
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "all of it"
            raise InputError(f"not a dataset manifest that this Convoy can read: {where}: {first['msg']}") from error

    @property
    def version(self) -> str:
        """The dataset version: SHA-256 of the canonical bytes, in hexadecimal."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


def canonical_json(value: object) -> bytes:
    """Returns JSON with sorted keys and no spaces, so that equal values have equal bytes and one digest."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
