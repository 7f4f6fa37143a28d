"""The part of a run's manifest that describes code, libraries and hardware: they also decide the bits of a result."""

import hashlib
import operator
import platform
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import Field

import cnn
from cnn.code_digest import code_digest
from cnn.data.manifest import canonical_json
from infra.records import Record
from infra.tracking.provenance import lock_digest

DIGEST_FORMAT = 2
"""How `code_digest` is made. Format 1 covered all files of `cnn`, by their places before `cnn` had packages."""

NOT_IN_WEIGHTS = (
    *("formats/", "preprocessing/", "serving/"),
    *("data/checks.py", "evaluation/grad_cam.py", "evaluation/label_errors.py"),
)
"""Parts of `cnn` that decide no weights: the dataset version covers what they read and pack."""

NO_FILES: Mapping[str, str] = MappingProxyType({})


class Platform(Record, extra="forbid"):
    """Code, libraries and hardware of a machine; equal platforms give equal weights."""

    digest_format: int = 1
    """`DIGEST_FORMAT` of the code that wrote this record."""

    code_digest: str
    """Digest of the parts of `cnn` that decide weights, and of the network's own files, without comments and
    formatting."""

    lock_sha256: str | None
    torch: str
    device: str
    """`cpu` or `cuda`."""

    instruction_set: str
    """Instruction set of the CPU or GPU: other instructions round differently."""

    threads_per_rank: int
    network_files: dict[str, str] = Field(default_factory=dict, exclude_if=operator.not_)
    """Files of a network of one's own, by path in the project's folder (`cnn.networks.own.network_files`). Without any,
    the key is left out, so that other runs keep their manifest's digest."""


def weight_files() -> list[Path]:
    """Returns the files of `cnn` that decide weights."""
    package = Path(cnn.__path__[0])
    return [
        file
        for file in sorted(package.rglob("*.py"))
        if not file.relative_to(package).as_posix().startswith(NOT_IN_WEIGHTS)
    ]


def this_platform(network_files: Mapping[str, str] = NO_FILES) -> Platform:
    """Returns the platform of processes that start now, for a training of a network with these files of one's own."""
    return Platform(**code_inputs(network_files), **this_machine())


def code_inputs(network_files: Mapping[str, str] = NO_FILES) -> dict[str, Any]:
    """Returns the fields of the platform that describe code and lock file."""
    return {
        "digest_format": DIGEST_FORMAT,
        "code_digest": joined_digest(code_digest(weight_files()), network_files),
        "lock_sha256": lock_digest(),
        "network_files": dict(network_files),
    }


@cache
def loaded_code() -> str:
    """Returns the digest of Convoy's code as it was at the first call, in this process or one that forked it.

    Only for programs that have just loaded the code.
    """
    return code_digest(weight_files())


def joined_digest(convoys: str, network_files: Mapping[str, str]) -> str:
    """Returns a digest of Convoy's code and a network's files: Convoy's own, if the network has none."""
    if not network_files:
        return convoys
    return hashlib.sha256(canonical_json({"convoy": convoys, "network": dict(network_files)})).hexdigest()


def this_machine() -> dict[str, Any]:
    """Returns the fields of the platform that describe PyTorch and the hardware."""
    import torch  # not above: programs that only read records do without it

    from cnn.distributed.process_group import THREADS_PER_RANK

    # No device is selected: that would take memory on a GPU on which a rank computes.
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "torch": torch.__version__,
        "device": "cuda" if gpu else "cpu",
        "instruction_set": gpu or f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads_per_rank": THREADS_PER_RANK,
    }


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns the values that differ, for people: `torch was 2.14.1, is 2.15.0`."""
    was, now = flatten(was), flatten(now)
    keys = sorted(was.keys() | now.keys())
    return [f"{key} was {was.get(key)}, is {now.get(key)}" for key in keys if was.get(key) != now.get(key)]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested values by dotted keys, as in `--set`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
