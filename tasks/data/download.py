"""The download task: stores the verified raw files of a data set in the bucket."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from rich.filesize import decimal

from cnn.config.preprocessing import PreprocessConfig
from infra.errors import ServiceError, UsageError, counted
from infra.settings import Settings
from infra.sources.base import Source, Workplace, reusable
from infra.sources.find import find_source
from infra.sources.folder import FolderSource
from infra.sources.location import OnFiles
from infra.sources.mirrors import Mirrors
from infra.sources.raw_data import RawSource
from infra.storage.cache import Cache
from infra.storage.object_store import ObjectStore, open_bucket
from tasks.data.label_tables import check_columns, images_of, table_options
from tasks.data.prune_mark import wait_for_prune
from tasks.orchestration.cancellation import stop_if_cancelled
from tasks.orchestration.progress import Advance, progress, run_logger
from tasks.orchestration.step import step


@step("download")
def download(dataset: str, config: PreprocessConfig | None = None, *, refresh: bool = False) -> RawSource:
    """Stores a data set in the bucket; files that are there already are not fetched again.

    Args:
        dataset: a catalogue name, a folder, a label table, an archive, or the `s3://` or `https://` address of one.
        config: says how a label table is read, and whether files are copied.
        refresh: fetch everything again.

    Raises:
        UsageError: there is no such data set, or it is no collection of labelled images.
        ServiceError: a mirror, a server or the bucket failed, refused or could not be reached.
    """
    stop_if_cancelled()
    settings = Settings()
    store = open_bucket(create=True)
    wait_for_prune(store)
    try:
        raw = _download(dataset, settings, store, config or PreprocessConfig(), refresh=refresh)
    except OSError as error:  # such as a full disk; errors in the user's own files are UsageErrors already
        where = error.filename or settings.cache
        raise ServiceError(f"{where}: {error.strerror or error}; CONVOY_HOME chooses another folder") from error
    run_logger().info(_summary(raw))
    return raw


def _download(
    dataset: str, settings: Settings, store: ObjectStore, config: PreprocessConfig, *, refresh: bool
) -> RawSource:
    options, keep_raw = table_options(config), config.keep_raw
    with Mirrors(settings.cache / "partial") as mirrors:
        place = Workplace(mirrors=mirrors, store=store, cache=Cache(settings.cache, store))
        source: Source
        with _listing(dataset) as on_files:
            source = find_source(dataset, mirrors, own_mirror=settings.mirror, on_files=on_files, options=options)
        if isinstance(source, FolderSource):
            source = images_of(source, dataset, options)
            check_columns(source.labels, dataset, config)
            if keep_raw is False or (keep_raw is None and source.is_large):
                return source.refer(place, refresh=refresh)
        elif keep_raw is False:
            raise UsageError(f"{dataset}: data.keep_raw=false is for folders only; unset it")
        else:
            check_columns(None, dataset, config)
        if not refresh and (raw := reusable(source, place)):
            return raw
        with progress(f"Downloading {source.name}", source.size, unit="bytes", artifact="download") as advance:
            return source.fetch(place, advance, refresh=refresh)


@contextmanager
def _listing(dataset: str) -> Iterator[OnFiles]:
    """Shows the progress of a listing once it proves to be long."""
    with ExitStack() as stack:
        advance: Advance | None = None

        def on_files(count: int) -> None:
            nonlocal advance
            advance = advance or stack.enter_context(progress(f"Listing {dataset}", None, unit="files"))
            advance(count)

        yield on_files


def _summary(raw: RawSource) -> str:
    if listing := raw.listing:
        listed = "as before" if raw.reused else "listed again"
        return f"{raw.name}: {counted(listing.count, 'file')}, {decimal(listing.bytes)}, {listed}; in {listing.address}"
    size = decimal(sum(file.size for file in raw.files))
    origins = {origin.removesuffix(f"/{path}.gz").removesuffix(f"/{path}") for path, origin in raw.served_by.items()}
    done = "in the bucket already" if raw.reused else "stored in the bucket"
    return f"{raw.name}: {counted(len(raw.files), 'file')}, {size}, {done}; from {', '.join(sorted(origins))}"
