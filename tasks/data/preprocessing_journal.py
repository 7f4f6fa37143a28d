"""What an interrupted preprocessing has in the bucket: whoever runs the same step next goes on from there.

    journals/<step key>/survey/<first position>.npz
    journals/<step key>/shards/<split>/<number>.json

Each object is complete by itself. Only an unbroken row of them counts, and a shard only while the bucket has it, so
nothing has to be written in order, and two machines at the same step do not disturb each other.
"""

import zipfile
from collections.abc import Iterable
from contextlib import suppress

from pydantic import ValidationError

from cnn.data.splits import SPLITS
from cnn.preprocessing.resume_records import PackedShard, SurveyPart
from infra.machine.threads import in_parallel
from infra.storage import bucket_layout
from infra.storage.object_store import ObjectMissing, ObjectStore
from tasks.data.dataset import is_stored


class Journal:
    """Of one step.

    Args:
        step: its key, the digest of all that decides what comes out.
    """

    def __init__(self, store: ObjectStore, step: str) -> None:
        self._store = store
        self._step = step

    def survey_parts(self) -> list[SurveyPart]:
        """From the source's first image on, without a gap."""
        found: dict[int, SurveyPart] = {}
        for info in self._store.list(bucket_layout.survey_parts(self._step)):
            with suppress(ObjectMissing, ValueError, KeyError, zipfile.BadZipFile):  # one that is damaged is none
                part = SurveyPart.from_bytes(self._store.get_bytes(info.key))
                found[part.start] = part
        row: list[SurveyPart] = []
        while (start := row[-1].stop if row else 0) in found:
            row.append(found[start])
        return row

    def note_part(self, part: SurveyPart) -> None:
        """Write it down."""
        self._store.put_bytes(bucket_layout.survey_part(self._step, part.start), part.to_bytes())

    def shards(self) -> list[PackedShard]:
        """Of each split those from the first on, without a gap, that are in the bucket."""
        keys = [info.key for info in self._store.list(bucket_layout.packed_shards(self._step))]
        noted = {(packed.split, packed.number): packed for packed in noted_shards(self._store, keys)}
        stored = in_parallel(lambda packed: is_stored(self._store, packed.shard), noted.values())
        present = {place for place, there in zip(noted, stored, strict=True) if there}
        row: list[PackedShard] = []
        for split in SPLITS:
            number = 0
            while (split, number) in present:
                row.append(noted[split, number])
                number += 1
        return row

    def note_shard(self, packed: PackedShard) -> None:
        """Write down a shard that is in the bucket."""
        key = bucket_layout.packed_shard(self._step, packed.split, packed.number)
        self._store.put_bytes(key, packed.model_dump_json().encode())

    def clear(self) -> None:
        """Remove all of it: the step is done, or is to begin anew."""
        in_parallel(lambda info: self._store.delete(info.key), self._store.list(bucket_layout.journal(self._step)))


def noted_shards(store: ObjectStore, keys: Iterable[str]) -> list[PackedShard]:
    """The shards that these objects of journals tell of; of those that are damaged or gone nothing is told."""

    def read(key: str) -> PackedShard | None:
        try:
            return PackedShard.model_validate_json(store.get_bytes(key))
        except (ObjectMissing, ValidationError):
            return None

    wanted = (key for key in keys if key.endswith(".json"))
    return [packed for packed in in_parallel(read, wanted) if packed]
