"""Records of an unfinished preprocessing, with which another process or machine can continue it.

The caller of `cnn.preprocessing.survey` and `cnn.preprocessing.pack` stores these records, and passes them in again.
"""

import json
from collections import Counter
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from numpy.typing import NDArray

from cnn.data.manifest import Record, Shard, Unreadable
from cnn.data.splits import Split
from cnn.formats.decode import ImageHeader
from cnn.preprocessing.pixel_statistics import PixelSums


@dataclass(frozen=True, kw_only=True)
class SurveyPart:
    """The result of the survey for n consecutive images of the source."""

    start: int
    """Position of the first image."""

    labels: NDArray[np.int64]
    splits: NDArray[np.int8]
    """Official splits: positions in `SPLITS`, or `UNDECIDED`."""

    keys: NDArray[np.uint64]
    """See `cnn.data.splits.content_keys`."""

    digests: NDArray[np.uint8]
    """n×32: SHA-256 of each image, see `cnn.formats.block.Survey`."""

    headers: Counter[ImageHeader]
    """Headers of the readable images."""

    @property
    def stop(self) -> int:
        """Position after the last image."""
        return self.start + len(self.labels)

    def to_bytes(self) -> bytes:
        """Returns an npz file; some 49 bytes per image."""
        headers = json.dumps([[*header, count] for header, count in self.headers.items()]).encode()
        file = BytesIO()
        np.savez(
            file,
            start=np.int64(self.start),
            labels=self.labels,
            splits=self.splits,
            keys=self.keys,
            digests=self.digests,
            looks=np.frombuffer(headers, dtype=np.uint8),  # the name of older files
        )
        return file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> "SurveyPart":
        """Reads the result of `to_bytes`."""
        with np.load(BytesIO(data), allow_pickle=False) as file:
            headers = json.loads(file["looks"].tobytes())
            return cls(
                start=int(file["start"]),
                labels=file["labels"],
                splits=file["splits"],
                keys=file["keys"],
                digests=file["digests"],
                headers=Counter({ImageHeader(*header): count for *header, count in headers}),
            )


class PackedShard(Record, extra="forbid"):
    """A finished shard of one split, with the statistics of its images for the manifest."""

    split: Split
    number: int
    """Position among the split's shards, from 0."""

    shard: Shard
    stop: int
    """Position in the source after the shard's last image."""

    sums: PixelSums
    unreadable: tuple[int, ...]
    """Positions in the source of the split's unreadable images after the previous shard."""

    examples: tuple[Unreadable, ...]
    """The first unreadable images."""
