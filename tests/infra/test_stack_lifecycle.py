"""Servers are started, found and stopped; SeaweedFS alone where that suffices, since it is ready in a second."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from infra.errors import Outage, ServiceError
from infra.settings import Settings
from infra.stack import ports
from infra.stack.endpoints import Endpoints
from infra.stack.local_stack import down, running, status, up
from infra.stack.ports import Ports
from infra.stack.state import SERVER_NAMES, StackFolder
from infra.storage.object_store import ObjectStore
from tests.infra.localstack import (
    S3,
    busy_port,
    own,
    own_environment,
    run_up,
    state_of,
    until,
    use,
)

__all__ = ["busy_port", "own", "own_environment"]  # fixtures

pytestmark = pytest.mark.usefixtures("own_environment")


@pytest.mark.long
def test_a_server_outlives_the_command_that_started_it(own: Settings) -> None:
    command = run_up(own)
    assert command.wait() == 0
    assert state_of(own).state == "running"
    leader = state_of(own).pid
    assert leader is not None
    assert os.getsid(leader) == leader != os.getsid(0)


def test_who_only_reads_is_told_what_does_not_run_and_starts_nothing(own: Settings) -> None:
    for only in (SERVER_NAMES, S3):
        with pytest.raises(ServiceError, match=rf"^not running in {own.home}: {', '.join(only)}; `convoy up` starts"):
            running(own, only=only)
    assert not own.home.exists()
    started = up(own, only=S3)
    assert running(own, only=S3) == started
    with pytest.raises(ServiceError, match=r": mlflow, prefect; `convoy up` starts them$"):
        running(own)
    assert [server.state for server in status(own)] == ["running", "stopped", "stopped"]


@pytest.mark.long
def test_two_commands_at_once_start_one_server(own: Settings) -> None:
    commands = [run_up(own), run_up(own)]
    for command in commands:
        _, complaints = command.communicate()
        assert (command.returncode, complaints) == (0, "")
    assert len(StackFolder(own).members("seaweedfs")) == 1


@pytest.mark.long
def test_down_stops_what_runs_and_says_so(own: Settings) -> None:
    up(own, only=S3)
    members = StackFolder(own).members("seaweedfs")
    assert members
    assert down(own) == ["seaweedfs"]
    assert not any(process.is_running() for process in members)
    assert state_of(own).state == "stopped"
    assert down(own) == []


def test_down_and_status_of_a_folder_that_was_never_used_leave_no_trace(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / ".convoy")
    assert down(settings) == []
    assert {server.state for server in status(settings)} == {"stopped"}
    assert not settings.home.exists()


@pytest.mark.long
def test_a_killed_server_is_dead_and_starts_again_at_the_same_address_with_its_data(
    own: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = up(own, only=S3)
    use(first, monkeypatch)
    ObjectStore.connect(own.bucket).put_bytes("key", b"kept")
    (process,) = StackFolder(own).members("seaweedfs")
    process.kill()
    until(lambda: state_of(own).state == "dead")
    assert up(own, only=S3) == first
    assert ObjectStore.connect(own.bucket).get_bytes("key") == b"kept"


@pytest.mark.long
def test_a_stale_record_does_not_harm_the_process_that_has_its_id_now(own: Settings) -> None:
    folder = StackFolder(own)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as stranger:
        created = psutil.Process(stranger.pid).create_time() - 3600
        folder.root.mkdir(parents=True)
        folder.record_file("seaweedfs").write_text(f'{{"pid": {stranger.pid}, "created": {created}, "digest": "old"}}')
        assert state_of(own).state == "dead"
        up(own, only=S3)
        assert state_of(own).state == "running"
        assert state_of(own).pid != stranger.pid
        down(own)
        assert stranger.poll() is None
        stranger.kill()


@pytest.mark.long
def test_servers_whose_state_folder_was_deleted_are_stopped(own: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.stack.processes.TERM_SECONDS", 1.0)  # a suspended process is ended by SIGKILL only
    up(own, only=S3)
    members = delete(own)
    up(own, only=S3)
    assert not any(process.is_running() for process in members)
    members = delete(own)
    assert down(own) == ["seaweedfs"]
    assert not any(process.is_running() for process in members)


def delete(own: Settings) -> set[psutil.Process]:
    """Deletes the state folder; returns the server's processes, suspended so that none ends by itself without data."""
    members = StackFolder(own).members("seaweedfs")
    for process in members:
        process.suspend()
    shutil.rmtree(own.home)
    return members


@pytest.mark.long
def test_a_stopped_server_that_does_not_answer_is_replaced(own: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.stack.local_stack.BUSY_SECONDS", 0.5)
    monkeypatch.setattr("infra.stack.processes.TERM_SECONDS", 0.5)
    monkeypatch.setattr("infra.stack.local_stack.ANSWER_SECONDS", 0.5)
    first = up(own, only=S3)
    (process,) = StackFolder(own).members("seaweedfs")
    process.send_signal(signal.SIGSTOP)
    events: list[str] = []
    assert up(own, events.append, only=S3) == first
    assert events[0] == "stopping seaweedfs, which does not answer"
    assert not process.is_running()


@pytest.mark.long
def test_a_store_that_goes_on_refusing_after_the_disk_was_full_is_started_again(
    own: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infra.stack.local_stack.STORE_SECONDS", 0.0)
    first = up(own, only=S3)
    use(first, monkeypatch)
    store = ObjectStore.connect(own.bucket)
    store.put_bytes("key", b"kept")
    (process,) = StackFolder(own).members("seaweedfs")
    before = process.rlimit(psutil.RLIMIT_FSIZE)
    process.rlimit(psutil.RLIMIT_FSIZE, (1, before[1]))  # no file can grow, as on a full disk
    until(lambda: not stores(store))
    process.rlimit(psutil.RLIMIT_FSIZE, before)
    assert not stores(store)
    events: list[str] = []
    assert up(own, events.append, only=S3) == first
    assert events[0] == "stopping seaweedfs, which does not store what is written"
    assert stores(store)
    assert store.get_bytes("key") == b"kept"


def stores(store: ObjectStore) -> bool:
    try:
        store.put_bytes("empty", b"")  # only an entry of the index
    except Outage:
        return False
    return True


def test_a_full_disk_stops_no_server(own: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    first = up(own, only=S3)
    monkeypatch.setattr("infra.stack.local_stack.FULL_DISK_BYTES", 1 << 60)
    events: list[str] = []
    assert up(own, events.append, only=S3) == first
    assert events == [f"the disk of {StackFolder(own).root} is full: nothing can be stored"]


@pytest.mark.long
def test_a_server_that_dies_at_its_start_is_reported_with_the_end_of_its_log(own: Settings) -> None:
    database = own.home / "mlflow" / "mlflow.db"
    database.parent.mkdir(parents=True)
    database.write_text("no database at all " * 1000)
    with pytest.raises(ServiceError, match=r"mlflow ended at its start with status 1; .*mlflow\.log ends: ") as failure:
        up(own, only=["mlflow"])
    assert "not a database" in str(failure.value)
    assert "\n" not in str(failure.value)
    assert StackFolder(own).members("mlflow") == set()


def test_a_state_folder_that_cannot_be_used_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ServiceError, match="cannot be started"):
        up(Settings(home=tmp_path / "file"), only=S3)


@pytest.mark.long
def test_a_busy_port_is_replaced_by_a_free_one_that_stays(own: Settings, busy_port: int) -> None:
    settings = own.model_copy(update={"s3_port": busy_port})
    events: list[str] = []
    first = up(settings, events.append, only=S3)
    assert f"port {busy_port} is not used for s3: another program has it" in events
    assert first.s3_endpoint_url != f"http://127.0.0.1:{busy_port}"
    events.clear()
    assert up(settings, events.append, only=S3) == first
    assert events == []  # it runs, and `convoy status` shows where
    down(settings)
    assert up(settings, only=S3).s3_endpoint_url == first.s3_endpoint_url


def test_a_port_on_which_nothing_listens_is_used_although_a_connection_has_it(busy_port: int) -> None:
    """Outgoing connections get their ports from a range of which users may choose one."""
    with socket.socket() as outgoing:
        outgoing.bind(("127.0.0.2", 0))
        outgoing.connect(("127.0.0.1", busy_port))
        port = outgoing.getsockname()[1]
        assert ports.choose(Ports(), kept=[], preferred={"prefect": port}).prefect == port
        assert ports.choose(Ports(), kept=[], preferred={"s3": port}).s3 != port  # SeaweedFS would end at its start
        assert ports.choose(Ports(), kept=[], preferred={"prefect": busy_port}).prefect != busy_port


@pytest.mark.long
def test_a_port_taken_between_the_look_and_the_start_is_replaced(
    own: Settings, busy_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = iter([True] * len(Ports.model_fields))  # at the first choice all ports seem free
    really = ports.is_free
    monkeypatch.setattr(ports, "is_free", lambda port, **how: next(looks, None) or really(port, **how))
    events: list[str] = []
    up(own.model_copy(update={"s3_port": busy_port}), events.append, only=S3)
    assert f"another program took port {busy_port} before seaweedfs did: choosing another" in events
    assert state_of(own).state == "running"


def test_an_answer_from_somebody_elses_server_does_not_count(own: Settings, s3: Endpoints) -> None:
    """The session's store answers at the address of the test's own store."""
    up(own, only=S3)
    folder = StackFolder(own)
    taken = int(s3.s3_endpoint_url.rsplit(":", 1)[1])
    (folder.root / "ports.json").write_text(folder.ports.model_copy(update={"s3": taken}).model_dump_json())
    assert state_of(own).url == s3.s3_endpoint_url
    assert state_of(own).state == "dead"


def test_ports_of_running_servers_stay_and_no_port_is_given_twice(busy_port: int) -> None:
    wanted = Ports(s3=busy_port, mlflow=busy_port, prefect=4200)
    chosen = ports.choose(wanted, kept=["mlflow"], preferred={})
    assert chosen.mlflow == busy_port
    assert chosen.s3 != busy_port
    numbers = list(chosen.model_dump().values())
    assert len(set(numbers)) == len(numbers)
    free = ports.choose(Ports(), kept=[], preferred={}).volume
    asked = ports.choose(Ports(mlflow=free), kept=[], preferred={"prefect": free})  # before another server's last port
    assert asked.prefect == free != asked.mlflow
