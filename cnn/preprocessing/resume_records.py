"""What an interrupted preprocessing leaves behind, so that another process, or machine, can go on with it.

Whoever calls `cnn.preprocessing.survey` and `cnn.preprocessing.split_packer` keeps these records, and hands them in
again.
"""

import json
from collections import Counter
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from numpy.typing import NDArray

from cnn.data.manifest import Record, Shard, Unreadable
from cnn.data.splits import Split
from cnn.formats.decode import Look
from cnn.preprocessing.pixel_statistics import PixelSums


@dataclass(frozen=True, kw_only=True)
class SurveyPart:
    """What the survey has found in n images of the source, one after another."""

    start: int
    """Position of the first."""

    labels: NDArray[np.int64]
    splits: NDArray[np.int8]
    """As the source has them: positions in `SPLITS`, or `UNDECIDED`."""

    keys: NDArray[np.uint64]
    """See `cnn.data.splits.content_keys`."""

    looks: Counter[Look]
    """Of the readable ones."""

    @property
    def stop(self) -> int:
        """Position after the last."""
        return self.start + len(self.labels)

    def to_bytes(self) -> bytes:
        """An npz file; some 17 bytes for each image."""
        looks = json.dumps([[*look, count] for look, count in self.looks.items()]).encode()
        file = BytesIO()
        np.savez(
            file,
            start=np.int64(self.start),
            labels=self.labels,
            splits=self.splits,
            keys=self.keys,
            looks=np.frombuffer(looks, dtype=np.uint8),
        )
        return file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> "SurveyPart":
        """What `to_bytes` gave."""
        with np.load(BytesIO(data), allow_pickle=False) as file:
            looks = json.loads(file["looks"].tobytes())
            return cls(
                start=int(file["start"]),
                labels=file["labels"],
                splits=file["splits"],
                keys=file["keys"],
                looks=Counter({Look(*look): count for *look, count in looks}),
            )


class PackedShard(Record, extra="forbid"):
    """A finished shard of one split, with what the manifest has to know of its images."""

    split: Split
    number: int
    """Place among the split's shards, from 0."""

    shard: Shard
    stop: int
    """Position in the source after the shard's last image."""

    sums: PixelSums
    unreadable: tuple[int, ...]
    """Positions in the source of this split's images that could not be read, since the shard before."""

    examples: tuple[Unreadable, ...]
    """The first of them."""
