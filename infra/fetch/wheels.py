"""Reads files of Python wheels from the index that pip or uv is configured for; installs and imports nothing."""

import importlib.util
import re
import shutil
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from infra.errors import ServiceError
from infra.fetch.packages import Downloads, environment_for_web, run_program
from infra.machine.files import file_digest

PIP_SECONDS = 600
ADDRESS = re.compile(
    r"(?P<project>[A-Za-z0-9._-]+)==(?P<version>[A-Za-z0-9.+!]+)/(?P<inside>.+)#sha256=(?P<sha256>\w{64})"
)
UV_SETTINGS = {
    "UV_DEFAULT_INDEX": "PIP_INDEX_URL",
    "UV_INDEX_URL": "PIP_INDEX_URL",
    "UV_INDEX": "PIP_EXTRA_INDEX_URL",
    "UV_EXTRA_INDEX_URL": "PIP_EXTRA_INDEX_URL",
    "UV_FIND_LINKS": "PIP_FIND_LINKS",
}
"""uv's variables, which name the same indexes to pip as these of its own."""


@contextmanager
def wheel_file(address: str, wheels: Downloads, limit: int | None = None) -> Iterator[Path]:
    """Yields the local copy of the file that `project==version/path inside#sha256=digest of the wheel` names.

    Args:
        wheels: those of one download run, by `pip_download`.
        limit: the largest accepted size of the file in bytes; None for no limit.

    Raises:
        ServiceError: pip is missing, the index does not have the wheel, or it is another one than promised.
    """
    parts = ADDRESS.fullmatch(address)
    if not parts:
        raise ServiceError("write pypi:PROJECT==VERSION/PATH#sha256=DIGEST, with the digest of the wheel")
    wheel = wheels.file(f"{parts['project']}=={parts['version']}")
    if (found := file_digest(wheel)) != parts["sha256"]:
        raise ServiceError(f"the SHA-256 of {wheel.name} is {found}, expected {parts['sha256']}")
    with tempfile.TemporaryDirectory(prefix="convoy-wheel-") as folder:
        target = Path(folder, "file")
        _extract(wheel, parts["inside"], target, limit)
        yield target


def pip_download(requirement: str, folder: Path) -> Path:
    """Runs `pip download` for one wheel, without those that it depends on."""
    place = Path(tempfile.mkdtemp(dir=folder))
    options = ["--quiet", "--no-input", "--no-deps", "--only-binary=:all:", "--retries=1", f"--dest={place}"]
    done = run_program(
        [*_pip(), "download", *options, requirement],
        what="pip download",
        seconds=PIP_SECONDS,
        environment=_with_uv_settings(environment_for_web()),
        folder=folder,
    )
    wheel = next(place.glob("*.whl"), None)
    if done.returncode or wheel is None:
        problems = re.findall(r"^ERROR: (.+)", done.stderr, re.MULTILINE)
        raise ServiceError(problems[-1] if problems else f"pip download exited with {done.returncode}")
    return wheel


def _pip() -> list[str]:
    """Returns the command that runs pip: this environment's, another one, or one that uv runs without installing it."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    for program, arguments in (("pip", ()), ("pip3", ()), ("uv", ("tool", "run", "pip"))):
        if found := shutil.which(program):
            return [found, *arguments]
    raise ServiceError("neither pip nor uv is installed")


def _with_uv_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment with uv's indexes for pip, unless pip's own variables name others."""
    own: dict[str, str] = {}
    for name, pips in UV_SETTINGS.items():
        for entry in re.split(r"[\s,]+", environment.get(name, "")):
            if entry and pips not in environment:
                address = re.sub(r"^[\w.-]+=", "", entry)  # uv's indexes may have names
                own[pips] = address if pips == "PIP_INDEX_URL" else f"{own.get(pips, '')} {address}".strip()
    return {**environment, **own}


def _extract(wheel: Path, inside: str, target: Path, limit: int | None) -> None:
    """Copies one file out of a wheel; writes none of its other files to the disk."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            info = archive.getinfo(inside)
            if limit is not None and info.file_size > limit:
                raise ServiceError(f"it holds {info.file_size} bytes, more than the {limit} expected")
            with archive.open(info) as content, target.open("wb") as file:
                shutil.copyfileobj(content, file)
    except KeyError:
        raise ServiceError(f"{wheel.name} holds no file {inside}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError) as error:
        raise ServiceError(f"{wheel.name} cannot be read: {error}") from error
