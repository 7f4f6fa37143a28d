"""Finds the source that a user's `dataset` names."""

import os
from pathlib import Path
from urllib.parse import unquote

from infra.errors import UsageError
from infra.fetch.meter import Meter
from infra.fetch.web import display, file_name
from infra.sources.archive import ArchiveSource
from infra.sources.catalogue import CatalogueSource
from infra.sources.entries import (
    ARCHIVE_SUFFIXES,
    TABLE_SUFFIXES,
    WHAT_TO_GIVE,
    catalogued,
    is_archive,
    is_table,
    no_such_dataset,
)
from infra.sources.folder import FolderSource, bucket_folder, local_folder
from infra.sources.label_table import TableOptions
from infra.sources.labelled import labelled_images
from infra.sources.location import BucketLocation, LocalLocation, OnFiles
from infra.sources.mirrors import Mirrors


def find_source(
    dataset: str,
    mirrors: Mirrors,
    *,
    own_mirror: str | None = None,
    on_files: OnFiles = lambda count: None,
    options: TableOptions | None = None,
) -> CatalogueSource | ArchiveSource | FolderSource:
    """Returns the source of a catalogue name, a folder, a label table, an archive, or the address of one.

    A catalogue name has precedence over a folder of the same name; `./mnist` names the folder.

    Args:
        on_files: called with numbers of files while a folder is listed.
        options: how a label table is read.

    Raises:
        UsageError: `dataset` names nothing; the message says what to give.
        ServiceError: the address's server failed.
    """
    if entry := catalogued(dataset):
        return CatalogueSource(entry, own_mirror)
    scheme, found, _ = dataset.partition("://")
    if found and scheme in {"http", "https"}:
        return _web(dataset, mirrors)
    if found and scheme == "s3":
        return _bucket(dataset, mirrors, on_files, options or TableOptions())
    if found and scheme != "file":
        raise UsageError(f"{dataset}: {scheme}:// is not supported; {WHAT_TO_GIVE}")
    path = _local_path(dataset)
    if os.path.isdir(path):  # unlike those of Path, these raise nothing, for a name that is too long say
        return local_folder(path, on_files)
    if os.path.isfile(path) and is_table(path.name):
        location = LocalLocation(path.absolute().parent)
        return labelled_images(path, path.name, location, f"file:{path.absolute()}", options or TableOptions())
    if os.path.isfile(path):
        _require_archive(path.name, str(path))
        return ArchiveSource(f"file:{path.absolute()}", path.name, path.stat().st_size)
    raise no_such_dataset(dataset)


def _local_path(dataset: str) -> Path:
    """Returns the path that the user or a `file:` address names."""
    if not dataset.startswith("file:"):
        return Path(os.path.expanduser(dataset))  # leaves `~` of an unknown user unchanged
    rest = dataset.removeprefix("file:")
    rest = rest.removeprefix("//localhost").removeprefix("//")
    literal = Path(os.path.expanduser(rest))
    return literal if literal.exists() else Path(os.path.expanduser(unquote(rest)))


def _web(address: str, mirrors: Mirrors) -> ArchiveSource:
    if is_table(file_name(address)):
        raise UsageError(
            f"{display(address)}: a label table is read from this machine or from a bucket; fetch it first"
        )
    _require_archive(file_name(address), display(address))
    version, size = mirrors.version(address)
    return ArchiveSource(address, file_name(address), size, version)


def _bucket(address: str, mirrors: Mirrors, on_files: OnFiles, options: TableOptions) -> ArchiveSource | FolderSource:
    store, key = mirrors.object(address)
    if not is_table(key) and not is_archive(key):
        return bucket_folder(store, key, on_files)
    version, size = mirrors.version(address)
    if is_table(key):
        folder, _, name = key.rpartition("/")
        location = BucketLocation(store, f"{folder}/" if folder else "")
        with mirrors.fetched(address, Meter(0, lambda count: None)) as file:
            return labelled_images(file, name, location, store.uri(key), options)
    return ArchiveSource(address, key.rpartition("/")[2], size, version)


def _require_archive(file: str, where: str) -> None:
    if not is_archive(file):
        known = " ".join((*ARCHIVE_SUFFIXES, *TABLE_SUFFIXES))
        raise UsageError(f"{where}: neither an archive nor a label table by its name; known are {known}")
