"""The cache of the bucket's files, against a real SeaweedFS."""

import hashlib
import io
import mmap
import multiprocessing
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from infra.errors import ServiceError
from infra.machine.files import atomic_file
from infra.machine.locks import locked
from infra.storage.cache import Cache
from infra.storage.cache_limit import CacheLimit, disk_limit
from infra.storage.object_store import ObjectStore
from infra.storage.s3_client import ObjectMissing

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


def _put_several(store: ObjectStore, count: int) -> list[str]:
    """Stores objects of 1000 bytes, named by their digest."""
    contents = [bytes([number]) * 1000 for number in range(count)]
    digests = [hashlib.sha256(content).hexdigest() for content in contents]
    for digest, content in zip(digests, contents, strict=True):
        store.put_bytes(digest, content)
    return digests


def _use_at(cache: Cache, digest: str, when: float) -> None:
    os.utime(cache.path(digest), (when, when))


def test_what_was_not_used_for_longest_leaves_when_a_file_comes_in(store: ObjectStore, tmp_path: Path) -> None:
    digests = _put_several(store, 6)
    cache = Cache(tmp_path / "cache", store, limit=3500)
    for when, digest in enumerate(digests[:3], start=1):
        _use_at(cache, cache.fetch(digest, digest).name, when)
    cache.fetch(digests[0], digests[0])  # is used again
    cache.fetch(digests[3], digests[3])
    assert {path.name for path in _files(cache)} == {digests[0], digests[2], digests[3]}
    cache.fetch(digests[1], digests[1], size=1000)  # a removed file can be fetched again
    assert {path.name for path in _files(cache)} == {digests[0], digests[1], digests[3]}


def test_a_cache_without_a_limit_keeps_everything(cache: Cache, store: ObjectStore) -> None:
    for digest in _put_several(store, 6):
        cache.fetch(digest, digest)
    assert len(_files(cache)) == 6


def test_trimming_removes_the_files_that_were_used_longest_ago(store: ObjectStore, tmp_path: Path) -> None:
    digests = _put_several(store, 3)
    cache = Cache(tmp_path / "cache", store, limit=3500)
    for when, digest in enumerate(digests, start=1):
        _use_at(cache, cache.fetch(digest, digest).name, when)
    added = {Cache(cache.root, store).add_stream(io.BytesIO(text * 200)) for text in (b"added", b"later")}
    assert {path.name for path in _files(cache)} == {*digests, *added}
    cache.trim()
    assert {path.name for path in _files(cache)} == {digests[2], *added}
    assert not list((cache.root / "locks").iterdir())


def test_a_file_that_leaves_stays_readable_for_those_who_have_it_open(store: ObjectStore, tmp_path: Path) -> None:
    first, second = _put_several(store, 2)
    cache = Cache(tmp_path / "cache", store, limit=1500)
    with cache.fetch(first, first).open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        cache.fetch(second, second)
        assert not cache.holds(first)
        assert mapped[:] == bytes(1000)


def test_a_file_larger_than_the_limit_comes_all_the_same(
    store: ObjectStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (digest,) = _put_several(store, 1)
    cache = Cache(tmp_path / "cache", store, limit=100)
    assert cache.fetch(digest, digest).stat().st_size == 1000
    assert "holds 900 bytes more than its limit of 100" in caplog.text


def test_nothing_leaves_that_a_preparation_may_have_fetched(store: ObjectStore, tmp_path: Path) -> None:
    digests = _put_several(store, 4)
    cache = Cache(tmp_path / "cache", store, limit=2500)
    _use_at(cache, cache.fetch(digests[0], digests[0]).name, 1)
    with locked(cache.root / "locks" / "preprocess-1"):
        cache.fetch(digests[1], digests[1])
        cache.fetch(digests[2], digests[2])
        cache.fetch(digests[3], digests[3])
        assert {path.name for path in _files(cache)} - {"preprocess-1"} == set(digests[1:])
    cache.fetch(digests[0], digests[0])
    assert len(_files(cache)) == 2


def test_what_a_killed_process_left_unfinished_is_removed_when_it_is_old(store: ObjectStore, tmp_path: Path) -> None:
    first, second = _put_several(store, 2)
    cache = Cache(tmp_path / "cache", store, limit=10_000)
    folder = cache.fetch(first, first).parent
    old, young = ([place / f".{name}.part" for place in (folder, cache.root)] for name in ("old", "young"))
    for file in (*old, *young):
        file.touch()
    for file in old:
        os.utime(file, (1, 1))
    cache.fetch(second, second)
    assert not any(file.exists() for file in old) and all(file.exists() for file in young)


def _fetch_many(root: Path, digests: list[str], seed: int) -> None:
    cache = Cache(root, ObjectStore.connect("test"), limit=4000)
    chosen = random.Random(seed)
    for _ in range(30):
        digest = chosen.choice(digests)
        for _ in range(5):  # another process may have removed it since
            try:
                content = cache.fetch(digest, digest, size=1000).read_bytes()
                break
            except FileNotFoundError:
                continue
        assert hashlib.sha256(content).hexdigest() == digest


@pytest.mark.long
def test_processes_that_share_a_limit_keep_to_it_together(store: ObjectStore, tmp_path: Path) -> None:
    digests, root = _put_several(store, 12), tmp_path / "cache"
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_fetch_many, args=(root, digests, seed)) for seed in range(3)]
    for process in processes:
        process.start()
    most = 0
    while any(process.is_alive() for process in processes):
        with locked(root / "locks" / "room"):  # no file is removed while files are counted
            most = max(most, _bytes_of_files(root))
        time.sleep(0.001)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert 3000 <= most <= 4000
    assert not [path for path in root.rglob("*") if path.is_file() and path.parent.name == "locks"]


def _come_and_go(root: Path, seed: int, seconds: float, most: "multiprocessing.Queue[int]") -> None:
    room, chosen, end, seen = CacheLimit(root, 12_000), random.Random(seed), time.monotonic() + seconds, 0
    names = [hashlib.sha256(bytes([number])).hexdigest() for number in range(24)]

    def fetch_some(_: int) -> None:
        nonlocal seen
        while time.monotonic() < end:
            name = chosen.choice(names)
            path, lock = root / name[:2] / name, root / "locks" / name
            with locked(lock):
                if not path.exists():
                    room.make_space(1000, lock)
                    with atomic_file(path) as temporary:
                        temporary.write_bytes(bytes(1000))
            with locked(root / "locks" / "room"):  # no file is removed while files are counted
                seen = max(seen, _bytes_of_files(root))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(fetch_some, range(2)))
    most.put(seen)


@pytest.mark.long
def test_a_file_that_arrives_while_room_is_made_for_another_is_counted(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    most: multiprocessing.Queue[int] = context.Queue()
    processes = [context.Process(target=_come_and_go, args=(tmp_path, seed, 3.0, most)) for seed in range(3)]
    for process in processes:
        process.start()
    assert 10_000 <= max(most.get(timeout=60) for _ in processes) <= 12_000
    for process in processes:
        process.join(60)
        assert process.exitcode == 0


def _bytes_of_files(root: Path) -> int:
    sizes: dict[int, int] = {}  # by inode, since an arriving file is renamed meanwhile
    for path in root.glob("[0-9a-f][0-9a-f]/*"):
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        sizes[status.st_ino] = status.st_size
    return sum(sizes.values())


def test_unless_told_a_cache_may_have_nine_tenths_of_what_is_free(cache: Cache, store: ObjectStore) -> None:
    free = os.statvfs(cache.root.parent)
    limit = disk_limit(cache.root)
    assert limit == pytest.approx(0.9 * free.f_bavail * free.f_frsize, rel=0.05)


def _count_up(lock: Path, counter: Path, times: int) -> None:
    for _ in range(times):
        with locked(lock):
            counter.write_text(str(int(counter.read_text()) + 1))


@pytest.mark.long
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


@pytest.mark.parametrize("known_size", [True, False])
def test_a_file_with_a_flipped_byte_is_fetched_again_with_a_warning(
    store: ObjectStore, tmp_path: Path, caplog: pytest.LogCaptureFixture, known_size: bool
) -> None:
    store.put_bytes("key", DATA)
    size = len(DATA) if known_size else None
    path = Cache(tmp_path / "cache", store).fetch("key", DIGEST, size=size)
    flip(path)
    assert Cache(tmp_path / "cache", store).fetch("key", DIGEST, size=size).read_bytes() == DATA
    assert f"{path} is damaged" in caplog.text
    flip(path)
    (tmp_path / "file").write_bytes(DATA)
    assert Cache(tmp_path / "cache", store).add_file(tmp_path / "file") == DIGEST
    assert path.read_bytes() == DATA and path.stat().st_mode & 0o222 == 0


def flip(path: Path) -> None:
    """Changes a byte as a failing disk would: size and times stay."""
    before = path.stat()
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(before.st_size // 2)
        byte = file.read(1)[0]
        file.seek(before.st_size // 2)
        file.write(bytes([byte ^ 1]))
    path.chmod(before.st_mode)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
