"""Reads files of Debian packages, which are installed or which apt downloads; needs no root."""

import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from infra.errors import ServiceError
from infra.fetch.packages import Downloads, environment_for_web, run_program
from infra.machine.files import CHUNK

APT_SECONDS = 600
APT_OPTIONS = (
    "Acquire::Retries=1",
    "Acquire::http::Timeout=10",
    "Acquire::https::Timeout=10",
    "APT::Sandbox::User=root",  # apt's own user cannot write to the temporary folder
)


@contextmanager
def debian_file(address: str, packages: Downloads) -> Iterator[Path]:
    """Yields the local file that `<package>/<path inside the package>` names.

    Args:
        packages: those of one download run, by `apt_download`.

    Raises:
        ServiceError: apt is missing, the package or file does not exist, or apt's servers do not answer.
    """
    package, _, inside = address.partition("/")
    if not re.fullmatch(r"[a-z0-9][a-z0-9+.-]+", package):
        raise ServiceError(f"{package!r} is no name of a Debian package")
    installed = Path("/", inside)
    if installed.is_file() and _is_installed(package):
        yield installed
        return
    with tempfile.TemporaryDirectory(prefix="convoy-deb-") as folder:
        target = Path(folder, "file")
        _unpack(packages.file(package), inside, target)
        yield target


def apt_download(package: str, folder: Path) -> Path:
    """Runs `apt-get download` with the system's package lists or, if that fails, with newly fetched private ones."""
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise ServiceError("apt-get is not installed, this is no Debian")
    problem = _apt(folder, "download", package)
    if problem:
        lists, cache = folder / "lists", folder / "cache"
        (lists / "partial").mkdir(parents=True, exist_ok=True)
        (cache / "archives" / "partial").mkdir(parents=True, exist_ok=True)
        private = (f"Dir::State::Lists={lists}", f"Dir::Cache={cache}")
        problem = _apt(folder, "update", options=private) or _apt(folder, "download", package, options=private)
    deb = next(folder.glob(f"{package}_*.deb"), None)
    if deb is None:
        raise ServiceError(f"apt-get cannot download {package}: {problem or 'it left no file'}")
    return deb


def _apt(folder: Path, *arguments: str, options: tuple[str, ...] = ()) -> str:
    """Runs apt-get in `folder`; returns the error message, empty on success."""
    command = ["apt-get", "-qq", *arguments, *(f"-o{option}" for option in (*APT_OPTIONS, *options))]
    what = f"apt-get {arguments[0]}"
    try:
        done = run_program(command, what=what, seconds=APT_SECONDS, environment=environment_for_web(), folder=folder)
    except ServiceError as error:
        return str(error)
    problems = [line.removeprefix("E: ") for line in done.stderr.splitlines() if line.startswith("E: ")]
    if done.returncode and not problems:
        return f"{what} exited with {done.returncode}"
    return problems[0] if problems else ""


def _is_installed(package: str) -> bool:
    if not shutil.which("dpkg-query"):
        return False
    query = ["dpkg-query", "--show", "--showformat=${db:Status-Status}", "--", package]
    return subprocess.run(query, capture_output=True, text=True).stdout == "installed"


def _unpack(deb: Path, inside: str, target: Path) -> None:
    """Copies one regular file out of a package; writes none of its other files to the disk."""
    wanted = PurePosixPath(inside)
    with subprocess.Popen(
        ["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as unpacker:
        try:
            with tarfile.open(fileobj=unpacker.stdout, mode="r|") as archive:
                for member in archive:
                    content = archive.extractfile(member) if member.isfile() else None
                    if content and PurePosixPath(member.name) == wanted:  # "./usr/…" equals "usr/…"
                        with target.open("wb") as file:
                            shutil.copyfileobj(content, file, CHUNK)
                        return
        except (tarfile.TarError, OSError) as error:
            raise ServiceError(f"{deb.name} cannot be unpacked: {error}") from error
        finally:
            unpacker.kill()
    raise ServiceError(f"{deb.name} holds no file /{inside}")
