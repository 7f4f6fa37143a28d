"""The part of a run's manifest that describes code, libraries and hardware: they also decide the bits of a result."""

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cnn
from cnn.code_digest import code_digest
from infra.records import Record
from infra.tracking.provenance import Provenance, provenance

DIGEST_FORMAT = 2
"""How `code_digest` is made. Format 1 covered all files of `cnn`, by their places before `cnn` had packages."""

NOT_IN_WEIGHTS = ("formats/", "preprocessing/", "serving/", "data/checks.py")
"""Parts of `cnn` that decide no weights: the dataset version covers what they read and pack."""


class Platform(Record, extra="forbid"):
    """Code, libraries and hardware of a machine; equal platforms give equal weights."""

    digest_format: int = 1
    """`DIGEST_FORMAT` of the code that wrote this record."""

    code_digest: str
    """Digest of the parts of `cnn` that decide weights, without comments and formatting."""

    lock_sha256: str | None
    torch: str
    device: str
    """`cpu` or `cuda`."""

    instruction_set: str
    """Instruction set of the CPU or GPU: other instructions round differently."""

    threads_per_rank: int


def weight_files() -> list[Path]:
    """Returns the files of `cnn` that decide weights."""
    package = Path(cnn.__path__[0])
    return [
        file
        for file in sorted(package.rglob("*.py"))
        if not file.relative_to(package).as_posix().startswith(NOT_IN_WEIGHTS)
    ]


def this_platform(code: Provenance | None = None) -> Platform:
    """Returns this process's platform; `code` is its provenance, if the caller knows it already."""
    import torch  # not above: programs that only read records do without it

    from cnn.distributed.process_group import THREADS_PER_RANK, local_device

    device = local_device().type
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return Platform(
        digest_format=DIGEST_FORMAT,
        code_digest=code_digest(weight_files()),
        lock_sha256=(code or provenance()).lock_sha256,
        torch=torch.__version__,
        device=device,
        instruction_set=gpu or f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        threads_per_rank=THREADS_PER_RANK,
    )


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns the values that differ, for people: `torch was 2.14.1, is 2.15.0`."""
    keys = sorted(was.keys() | now.keys())
    return [f"{key} was {was.get(key)}, is {now.get(key)}" for key in keys if was.get(key) != now.get(key)]
