"""The journal of a preprocessing in the bucket: after an interruption, the next run of the same step continues from it.

    journals/<step key>/survey/<first position>.npz
    journals/<step key>/shards/<split>/<number>.json

Each object is complete by itself. Only an unbroken sequence of them counts, and a shard only while the bucket has it.
So they can be written in any order, and two machines at the same step do not disturb each other.
"""

import zipfile
from collections.abc import Iterable
from contextlib import suppress
from functools import partial

from cnn.data.splits import SPLITS
from cnn.preprocessing.resume_records import PackedShard, SurveyPart
from infra.machine.threads import in_parallel
from infra.storage import bucket_layout
from infra.storage.object_store import ObjectStore
from infra.storage.s3_client import ObjectMissing
from tasks.data.dataset import is_stored


class Journal:
    """The journal of the preprocessing step with this key, a digest of all that decides its result."""

    def __init__(self, store: ObjectStore, step: str) -> None:
        self._store, self._step = store, step

    def survey_parts(self) -> list[SurveyPart]:
        """Returns the parts from the source's first image on, up to the first gap."""
        found: dict[int, SurveyPart] = {}
        for info in self._store.list(bucket_layout.survey_parts(self._step)):
            with suppress(ObjectMissing, ValueError, KeyError, zipfile.BadZipFile):  # damaged parts are ignored
                part = SurveyPart.from_bytes(self._store.get_bytes(info.key))
                found[part.start] = part
        parts: list[SurveyPart] = []
        while (start := parts[-1].stop if parts else 0) in found:
            parts.append(found[start])
        return parts

    def note_part(self, part: SurveyPart) -> None:
        """Records a part of the survey."""
        self._store.put_bytes(bucket_layout.survey_part(self._step, part.start), part.to_bytes())

    def shards(self) -> list[PackedShard]:
        """Returns the stored shards of each split from its first shard on, up to the first gap."""
        keys = [info.key for info in self._store.list(bucket_layout.packed_shards(self._step))]
        noted = {(packed.split, packed.number): packed for packed in noted_shards(self._store, keys)}
        stored = in_parallel(lambda packed: is_stored(self._store, packed.shard), noted.values())
        present = {place for place, is_there in zip(noted, stored, strict=True) if is_there}
        shards: list[PackedShard] = []
        for split in SPLITS:
            number = 0
            while (split, number) in present:
                shards.append(noted[split, number])
                number += 1
        return shards

    def note_shard(self, packed: PackedShard) -> None:
        """Records a shard that is in the bucket."""
        key = bucket_layout.packed_shard(self._step, packed.split, packed.number)
        self._store.put_bytes(key, packed.model_dump_json().encode())

    def clear(self) -> None:
        """Deletes the journal: the step is done, or starts again."""
        in_parallel(lambda info: self._store.delete(info.key), self._store.list(bucket_layout.journal(self._step)))


def noted_shards(store: ObjectStore, keys: Iterable[str]) -> list[PackedShard]:
    """Returns the shards that these journal entries record; damaged and missing entries are ignored."""
    wanted = (key for key in keys if key.endswith(".json"))
    return [packed for packed in in_parallel(partial(store.read_record, kind=PackedShard), wanted) if packed]
