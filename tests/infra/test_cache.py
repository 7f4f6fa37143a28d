"""The cache of the bucket's files, against a real SeaweedFS."""

import hashlib
import io
import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from infra.cache import Cache
from infra.errors import ServiceError
from infra.files import locked
from infra.objectstore import ObjectMissing, ObjectStore

DATA = b"some content" * 1000
DIGEST = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def cache(store: ObjectStore, tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", store)


def _files(cache: Cache) -> list[Path]:
    return sorted(path for path in cache.root.rglob("*") if path.is_file())


def test_a_missing_file_is_fetched_once_and_then_found_here(cache: Cache, store: ObjectStore) -> None:
    store.put_bytes("key", DATA)
    moved: list[int] = []
    path = cache.fetch("key", DIGEST, on_progress=moved.append)
    assert path == cache.root / DIGEST[:2] / DIGEST
    assert path.read_bytes() == DATA and sum(moved) == len(DATA)
    assert cache.fetch("key", DIGEST, on_progress=moved.append) == path
    assert sum(moved) == len(DATA)


def test_a_cached_file_is_served_though_its_object_is_gone(cache: Cache, store: ObjectStore) -> None:
    store.put_bytes("key", DATA)
    cache.fetch("key", DIGEST)
    store.delete("key")
    assert cache.fetch("key", DIGEST).read_bytes() == DATA
    assert cache.fetch("key", DIGEST, size=len(DATA)).read_bytes() == DATA


def test_a_cached_file_of_the_wrong_size_is_fetched_again(cache: Cache, store: ObjectStore) -> None:
    store.put_bytes("key", DATA)
    path = cache.fetch("key", DIGEST)
    path.chmod(0o600)
    path.write_bytes(DATA[:-1])
    assert cache.fetch("key", DIGEST).read_bytes() == DATA
    path.unlink()
    path.write_bytes(b"")
    assert cache.fetch("key", DIGEST, size=len(DATA)).read_bytes() == DATA


def test_a_damaged_object_does_not_enter_the_cache(cache: Cache, store: ObjectStore) -> None:
    store.put_bytes("key", b"something else")
    with pytest.raises(ServiceError, match=DIGEST):
        cache.fetch("key", DIGEST)
    assert _files(cache) == []


def test_what_is_neither_here_nor_in_the_bucket_is_missing(cache: Cache) -> None:
    with pytest.raises(ObjectMissing):
        cache.fetch("key", DIGEST)


def test_a_stream_is_named_by_its_content_and_cannot_be_written_to(cache: Cache) -> None:
    assert cache.add_stream(io.BytesIO(DATA)) == DIGEST
    assert cache.path(DIGEST).read_bytes() == DATA
    assert cache.path(DIGEST).stat().st_mode & 0o222 == 0


def test_a_stream_that_is_too_long_is_read_no_further_than_one_byte_beyond(cache: Cache) -> None:
    stream = io.BytesIO(DATA)
    with pytest.raises(ServiceError, match="more than the 100 bytes"):
        cache.add_stream(stream, size=100)
    assert stream.tell() == 101
    assert _files(cache) == []


def test_a_stream_with_another_digest_or_size_is_refused(cache: Cache) -> None:
    with pytest.raises(ServiceError, match=f"{hashlib.sha256(b'x').hexdigest()}, expected {DIGEST}"):
        cache.add_stream(io.BytesIO(b"x"), sha256=DIGEST)
    with pytest.raises(ServiceError, match="1 bytes, expected 2"):
        cache.add_stream(io.BytesIO(b"x"), size=2)
    assert _files(cache) == []


def test_a_copied_file_does_not_follow_later_changes(cache: Cache, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(DATA)
    assert cache.add_file(source) == cache.add_file(source) == DIGEST
    source.write_bytes(b"changed")
    assert cache.path(DIGEST).read_bytes() == DATA


def test_threads_that_want_one_file_fetch_it_once(cache: Cache, store: ObjectStore) -> None:
    store.put_bytes("key", DATA)
    moved: list[int] = []
    with ThreadPoolExecutor(6) as pool:
        paths = list(pool.map(lambda _: cache.fetch("key", DIGEST, on_progress=moved.append), range(6)))
    assert set(paths) == {cache.path(DIGEST)}
    assert sum(moved) == len(DATA)
    assert _files(cache) == [cache.path(DIGEST)]


def _count_up(lock: Path, counter: Path, times: int) -> None:
    for _ in range(times):
        with locked(lock):
            counter.write_text(str(int(counter.read_text()) + 1))


def test_a_lock_lets_one_process_in_at_a_time(tmp_path: Path) -> None:
    lock, counter = tmp_path / "locks" / "one", tmp_path / "counter"
    counter.write_text("0")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_count_up, args=(lock, counter, 200)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert counter.read_text() == "600"
    assert not lock.exists()
