"""Fetching and verifying files: real HTTP with faults, a real object store, a real apt."""

import gzip
import hashlib
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from infra.errors import ServiceError, UsageError
from infra.fetch.meter import Meter
from infra.sources.entries import CatalogueFile
from infra.sources.mirrors import Mirrors, addresses, obtain
from infra.stack.endpoints import Endpoints
from infra.storage.cache import Cache
from infra.storage.object_store import ObjectStore
from tests.infra.webserver import WebServer

CONTENT = os.urandom(400_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
PLAIN = CatalogueFile(name="data.bin", size=len(CONTENT), sha256=SHA256)
PACKED = CatalogueFile(name="data.bin.gz", size=len(CONTENT), sha256=SHA256)


@pytest.fixture(scope="module")
def module_store(s3: Endpoints) -> ObjectStore:
    return ObjectStore.connect("test-mirrors")


@pytest.fixture
def cache(module_store: ObjectStore, tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", module_store)


class Fetcher:
    """One download run after another, with the same cache and partial files."""

    def __init__(self, cache: Cache, partial: Path) -> None:
        self.cache = cache
        self.partial = partial
        self.reported: list[int] = []

    def get(self, file: CatalogueFile, places: Sequence[str]) -> str:
        """Returns the address that served the file; checks the content of the cache."""
        self.reported.clear()
        with Mirrors(self.partial, connect_seconds=0.3) as mirrors:
            meter = Meter(file.size, self.reported.append, threading.Event())
            digest, origin = obtain(file, places, mirrors, self.cache, meter)
        assert self.cache.path(digest).read_bytes() == CONTENT
        assert sum(self.reported) == file.size
        return origin


@pytest.fixture
def fetcher(cache: Cache, tmp_path: Path) -> Fetcher:
    return Fetcher(cache, tmp_path / "partial")


def _refusal(fetcher: Fetcher, file: CatalogueFile, places: Sequence[str]) -> str:
    with pytest.raises(ServiceError) as raised:
        fetcher.get(file, places)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_file_is_downloaded_and_leaves_nothing_partial(fetcher: Fetcher, web: WebServer) -> None:
    web.files["/data.bin"] = CONTENT
    assert fetcher.get(PLAIN, [f"{web.url}/data.bin"]) == f"{web.url}/data.bin"
    assert list(fetcher.partial.iterdir()) == []


def test_a_gzip_file_is_unpacked_however_a_mirror_compressed_it(fetcher: Fetcher, web: WebServer) -> None:
    web.files["/data.bin.gz"] = gzip.compress(CONTENT, compresslevel=1, mtime=7)
    fetcher.get(PACKED, [f"{web.url}/data.bin.gz"])
    web.files["/data.bin.gz"] = gzip.compress(CONTENT[:5], 9) + gzip.compress(CONTENT[5:], 9)
    fetcher.get(PACKED, [f"{web.url}/data.bin.gz"])


def test_a_download_resumes_after_a_cut_connection(fetcher: Fetcher, web: WebServer) -> None:
    web.files["/data.bin"] = CONTENT
    web.faults["/data.bin"] = ["cut", "cut"]
    fetcher.get(PLAIN, [f"{web.url}/data.bin"])
    ranges = web.gets("/data.bin")
    assert ranges[0] is None and len(ranges) == 3
    assert ranges[1] == "bytes=200000-" and ranges[2] == "bytes=300000-"
    assert web.sent == len(CONTENT)


def test_a_download_resumes_in_a_later_run(fetcher: Fetcher, web: WebServer) -> None:
    web.files["/data.bin"] = CONTENT
    web.faults["/data.bin"] = ["cut", "500", "500"]
    assert "500 Internal Server Error" in _refusal(fetcher, PLAIN, [f"{web.url}/data.bin"])
    fetcher.get(PLAIN, [f"{web.url}/data.bin"])
    assert web.gets("/data.bin")[-1] == "bytes=200000-"
    assert web.sent == len(CONTENT)


def test_a_file_that_was_whole_already_is_not_downloaded_again(fetcher: Fetcher, web: WebServer) -> None:
    web.files["/data.bin"] = CONTENT
    web.faults["/data.bin"] = ["cut", "500", "500"]
    _refusal(fetcher, PLAIN, [f"{web.url}/data.bin"])
    partial = next(path for path in fetcher.partial.iterdir() if not path.suffix)
    partial.write_bytes(CONTENT)
    sent = web.sent
    fetcher.get(PLAIN, [f"{web.url}/data.bin"])
    assert web.sent == sent


def test_a_file_that_changed_on_the_server_is_not_pasted_to_its_old_start(fetcher: Fetcher, web: WebServer) -> None:
    web.files["/data.bin"] = CONTENT[::-1]
    web.faults["/data.bin"] = ["cut", "500", "500"]
    _refusal(fetcher, PLAIN, [f"{web.url}/data.bin"])
    web.files["/data.bin"] = CONTENT
    fetcher.get(PLAIN, [f"{web.url}/data.bin"])


def test_a_server_without_ranges_is_asked_for_the_whole_file_again(fetcher: Fetcher, web: WebServer) -> None:
    web.files["/data.bin"] = CONTENT
    web.faults["/data.bin"] = ["cut", "no ranges"]
    fetcher.get(PLAIN, [f"{web.url}/data.bin"])
    assert len(web.gets("/data.bin")) == 2


def test_wrong_bytes_are_refused_with_both_digests_and_the_next_mirror_serves(fetcher: Fetcher, web: WebServer) -> None:
    web.files |= {"/bad/data.bin": b"x" * len(CONTENT), "/good/data.bin": CONTENT}
    places = [f"{web.url}/bad/data.bin", f"{web.url}/good/data.bin"]
    assert fetcher.get(PLAIN, places) == places[1]
    message = _refusal(fetcher, PLAIN, places[:1])
    assert SHA256 in message and hashlib.sha256(b"x" * len(CONTENT)).hexdigest() in message
    assert places[0] in message
    assert list(fetcher.partial.iterdir()) == []


def test_wrong_content_of_a_gzip_file_is_refused_with_both_digests(fetcher: Fetcher, web: WebServer) -> None:
    web.files["/data.bin.gz"] = gzip.compress(b"other")
    message = _refusal(fetcher, PACKED, [f"{web.url}/data.bin.gz"])
    assert SHA256 in message and hashlib.sha256(b"other").hexdigest() in message


def test_a_page_in_place_of_a_gzip_file_is_refused_with_both_digests(fetcher: Fetcher, web: WebServer) -> None:
    page = b"<html>log in to this network</html>"
    web.files["/data.bin.gz"] = page
    message = _refusal(fetcher, PACKED, [f"{web.url}/data.bin.gz"])
    assert SHA256 in message and hashlib.sha256(page).hexdigest() in message


def test_a_path_with_two_leading_slashes_is_no_path_below_the_working_folder(
    fetcher: Fetcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.bin").write_bytes(CONTENT)
    assert "//data.bin (no such file)" in _refusal(fetcher, PLAIN, ["file://data.bin"])


def test_a_cut_gzip_file_is_refused(fetcher: Fetcher, web: WebServer) -> None:
    web.files["/data.bin.gz"] = gzip.compress(CONTENT)[:-20]
    assert "no whole gzip file" in _refusal(fetcher, PACKED, [f"{web.url}/data.bin.gz"])


def test_a_decompression_bomb_is_not_unpacked(fetcher: Fetcher, web: WebServer) -> None:
    web.files["/data.bin.gz"] = gzip.compress(bytes(100 * len(CONTENT)))
    message = _refusal(fetcher, PACKED, [f"{web.url}/data.bin.gz"])
    assert f"more than the {len(CONTENT)} bytes" in message
    assert not any(path.is_file() for path in fetcher.cache.root.rglob("*"))


def test_a_file_far_too_long_is_not_downloaded_whole(fetcher: Fetcher, web: WebServer) -> None:
    web.files["/data.bin"] = bytes(10 * len(CONTENT))
    assert "more than" in _refusal(fetcher, PLAIN, [f"{web.url}/data.bin"])
    assert list(fetcher.partial.iterdir()) == []


def test_a_publishers_md5_is_verified_before_unpacking(fetcher: Fetcher, web: WebServer) -> None:
    published = gzip.compress(CONTENT, mtime=0)
    md5 = hashlib.md5(published).hexdigest()
    file = CatalogueFile(name="data.bin.gz", size=len(CONTENT), md5=md5)
    web.files["/data.bin.gz"] = published
    fetcher.get(file, [f"{web.url}/data.bin.gz"])
    web.files["/data.bin.gz"] = gzip.compress(CONTENT, mtime=1)
    message = _refusal(fetcher, file, [f"{web.url}/data.bin.gz"])
    assert md5 in message and hashlib.md5(web.files["/data.bin.gz"]).hexdigest() in message


def test_a_missing_file_is_asked_for_once_and_a_failing_server_twice(fetcher: Fetcher, web: WebServer) -> None:
    web.files["/failing"] = CONTENT
    web.faults["/failing"] = ["500"]
    assert fetcher.get(PLAIN, [f"{web.url}/missing", f"{web.url}/failing"]) == f"{web.url}/failing"
    assert len(web.gets("/missing")) == 1
    assert len(web.gets("/failing")) == 2


def test_every_mirror_that_failed_is_listed_with_its_reason(fetcher: Fetcher, web: WebServer, tmp_path: Path) -> None:
    message = _refusal(
        fetcher,
        PLAIN,
        [
            f"{web.url}/data.bin",
            "http://127.0.0.1:9/data.bin",
            f"file:{tmp_path}/none/data.bin",
            "package:no_such_package_at_all/data.bin",
            "gopher://old/data.bin",
        ],
    )
    assert f"{web.url}/data.bin (404 Not Found)" in message
    assert "http://127.0.0.1:9/data.bin (no connection to 127.0.0.1: Connection refused)" in message
    assert f"file:{tmp_path}/none/data.bin (no such file)" in message
    assert "no_such_package_at_all is not installed" in message
    assert "gopher://old/data.bin (no such kind of address" in message
    assert "CONVOY_MIRROR" in message


def test_passwords_and_signatures_in_an_address_are_not_shown(fetcher: Fetcher, web: WebServer) -> None:
    place = f"{web.url}/data.bin?signature=hidden1".replace("http://", "http://user:hidden2@")
    assert "hidden" not in _refusal(fetcher, PLAIN, [place])
    web.files["/data.bin"] = CONTENT
    assert fetcher.get(PLAIN, [place]) == f"{web.url}/data.bin"


def test_a_host_that_never_answers_is_given_up(fetcher: Fetcher, tmp_path: Path) -> None:
    (tmp_path / "data.bin").write_bytes(CONTENT)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as silent:
        fillers = [socket.socket() for _ in range(3)]
        for filler in fillers:  # once its queue is full, the kernel ignores further connections
            filler.setblocking(False)
            filler.connect_ex(silent.getsockname())
        place = f"http://127.0.0.1:{silent.getsockname()[1]}/data.bin"
        assert "no answer" in _refusal(fetcher, PLAIN, [place])
        assert fetcher.get(PLAIN, [place, f"file:{tmp_path}/data.bin"]) == f"file:{tmp_path}/data.bin"
        for filler in fillers:
            filler.close()


def test_files_and_packages_and_buckets_are_mirrors_too(
    fetcher: Fetcher, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "mirror" / "with space" / "data.bin"
    source.parent.mkdir(parents=True)
    source.write_bytes(CONTENT)
    package = tmp_path / "python" / "some_package" / "data"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "data.bin").write_bytes(CONTENT)
    monkeypatch.syspath_prepend(str(package.parents[1]))
    store.put_file("mirror/data.bin", source)
    for place in (
        f"file:{source}",
        f"file://{source}".replace(" ", "%20"),
        "package:some_package/data/data.bin",
        f"s3://{store.bucket}/mirror/data.bin",
    ):
        assert fetcher.get(PLAIN, [place]) == place
    assert source.read_bytes() == CONTENT
    message = _refusal(fetcher, PLAIN, [f"s3://{store.bucket}/mirror/none", "s3://no-such-bucket/x"])
    assert "no such object" in message and "no such bucket" in message


def test_the_users_mirror_comes_first_with_or_without_a_folder_a_data_set(
    fetcher: Fetcher, web: WebServer, tmp_path: Path
) -> None:
    official = f"{web.url}/official"
    web.files["/official/data.bin"] = web.files["/mine/data.bin"] = CONTENT
    assert fetcher.get(PLAIN, addresses(PLAIN, "set", [official], None)) == f"{official}/data.bin"
    own = addresses(PLAIN, "set", [official], f"{web.url}/mine/")
    assert fetcher.get(PLAIN, own) == f"{web.url}/mine/data.bin"
    web.files["/mine/set/data.bin"] = CONTENT
    assert fetcher.get(PLAIN, own) == f"{web.url}/mine/set/data.bin"
    (tmp_path / "data.bin").write_bytes(CONTENT)
    folder = addresses(PLAIN, "set", [official], str(tmp_path))
    assert fetcher.get(PLAIN, folder) == f"file:{tmp_path}/data.bin"
    empty = addresses(PLAIN, "set", [official], str(tmp_path / "empty"))
    assert fetcher.get(PLAIN, empty) == f"{official}/data.bin"
    with pytest.raises(UsageError, match="CONVOY_MIRROR"):
        addresses(PLAIN, "set", [official], "ftp://mine")


def test_two_runs_that_want_one_address_do_not_mix_their_bytes(
    fetcher: Fetcher, web: WebServer, tmp_path: Path
) -> None:
    web.files["/data.bin"] = CONTENT
    web.faults["/data.bin"] = ["cut", "cut"]

    def get(number: int) -> str:
        return Fetcher(Cache(tmp_path / str(number), fetcher.cache.store), fetcher.partial).get(
            PLAIN, [f"{web.url}/data.bin"]
        )

    with ThreadPoolExecutor(3) as pool:
        assert set(pool.map(get, range(3))) == {f"{web.url}/data.bin"}
    assert web.sent == 3 * len(CONTENT)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An apt repository in a folder, with one package; apt is configured for it but has no package list yet."""
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        pytest.skip("apt-get or dpkg-deb is missing: run the tests on Debian or Ubuntu")
    root = tmp_path / "repository"
    content = root / "build" / "usr" / "share" / "convoy-test"
    content.mkdir(parents=True)
    (content / "data.bin").write_bytes(CONTENT)
    (content / "link.bin").symlink_to("data.bin")
    control = "Package: convoy-test-data\nVersion: 1.0\nArchitecture: all\nMaintainer: nobody\n"
    (root / "build" / "DEBIAN").mkdir()
    (root / "build" / "DEBIAN" / "control").write_text(control + "Description: data for a test\n")
    deb = root / "convoy-test-data_1.0_all.deb"
    subprocess.run(["dpkg-deb", "-Zgzip", "--build", root / "build", deb], check=True, capture_output=True)
    (root / "Packages").write_text(
        f"{control}Filename: ./{deb.name}\nSize: {deb.stat().st_size}\n"
        f"SHA256: {hashlib.sha256(deb.read_bytes()).hexdigest()}\n"
    )
    (tmp_path / "sources.list").write_text(f"deb [trusted=yes] file:{root} ./\n")
    (tmp_path / "lists" / "partial").mkdir(parents=True)
    config = tmp_path / "apt.conf"
    config.write_text(
        f'Dir::Etc::sourcelist "{tmp_path}/sources.list";\nDir::Etc::sourceparts "/dev/null";\n'
        f'Dir::State::Lists "{tmp_path}/lists";\nDir::Cache "{tmp_path}/aptcache";\n'
    )
    monkeypatch.setenv("APT_CONFIG", str(config))
    return root


@pytest.mark.usefixtures("repository")
def test_a_debian_package_serves_though_the_package_lists_are_empty(fetcher: Fetcher) -> None:
    place = "deb:convoy-test-data/usr/share/convoy-test/data.bin"
    assert fetcher.get(PLAIN, [place]) == place


@pytest.mark.usefixtures("repository")
def test_an_unknown_package_or_file_in_it_is_named(fetcher: Fetcher) -> None:
    message = _refusal(
        fetcher,
        PLAIN,
        [
            "deb:convoy-no-such-package/data.bin",
            "deb:convoy-test-data/usr/share/convoy-test/none",
            "deb:convoy-test-data/usr/share/convoy-test/link.bin",
            "deb:--option/data.bin",
        ],
    )
    assert "apt-get cannot download convoy-no-such-package: Unable to locate package" in message
    assert "holds no file /usr/share/convoy-test/none" in message
    assert "holds no file /usr/share/convoy-test/link.bin" in message
    assert "'--option' is no name of a Debian package" in message


def test_without_apt_a_debian_mirror_says_so(fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert "apt-get is not installed" in _refusal(fetcher, PLAIN, ["deb:some-package/data.bin"])
