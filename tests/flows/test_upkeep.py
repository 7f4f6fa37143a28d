"""The commands that clean up: their output and exit statuses."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from prefect.settings import PREFECT_LOGGING_TO_API_ENABLED, temporary_settings
from prefect.states import Running

from flows.cli import upkeep
from infra.errors import UsageError
from infra.settings import Settings
from infra.storage.object_store import ObjectStore
from tasks.training.liveness import lock_file
from tests.tasks.leftovers import Leftovers, flow_run_in

Output = pytest.CaptureFixture[str]


@pytest.fixture
def made(
    quiet_prefect: None, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Leftovers]:
    monkeypatch.setenv("CONVOY_BUCKET", "test")
    monkeypatch.setenv("CONVOY_HOME", str(tmp_path / "home"))
    leftovers = Leftovers(store, monkeypatch)
    leftovers.hide_others(monkeypatch)
    with temporary_settings({PREFECT_LOGGING_TO_API_ENABLED: False}):  # else logs are on their way when Prefect ends
        yield leftovers
    leftovers.end()


@pytest.mark.long
def test_prune_says_what_goes(made: Leftovers, capsys: Output) -> None:
    made.run(days=2)
    upkeep.prune(dry_run=True)
    assert "would be removed" in (said := capsys.readouterr().out) and "checkpoints" in said
    assert len(made.there("runs/")) == 7
    upkeep.prune(settings=["finished_checkpoints_days=3"])
    assert "Nothing was old enough" in capsys.readouterr().out
    upkeep.prune()
    assert "removed" in capsys.readouterr().out
    assert len(made.there("runs/")) == 5


def test_prune_refuses_a_wrong_key_before_it_needs_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "servers_up", lambda: pytest.fail("it started servers"))
    with pytest.raises(UsageError, match="wrong"):
        upkeep.prune(settings=["wrong=1"])


def test_doctor_counts_what_one_finding_has_settled_for_another(made: Leftovers, capsys: Output) -> None:
    """After the kill of `convoy train`, the MLflow run and the flow run are findings; the former settles the latter."""
    flow_run = flow_run_in(Running())
    run = made.run("RUNNING", flow_run=str(flow_run.id))
    for lock in (Settings().home / "flows" / str(flow_run.id), lock_file(run)):
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.write_text(str(flow_run.id))  # as a killed process leaves it
    upkeep.doctor(fix=True)
    said = capsys.readouterr().out
    assert f"settled: run {run}" in said and f"settled: flow {flow_run.id}" in said


@pytest.mark.long
def test_doctor_exits_with_1_until_all_is_settled(made: Leftovers, capsys: Output) -> None:
    work = Settings().home / "work" / "preprocess-dead"
    work.mkdir(parents=True)
    with pytest.raises(typer.Exit) as ended:
        upkeep.doctor()
    assert ended.value.exit_code == 1 and str(work) in capsys.readouterr().out and work.exists()
    upkeep.doctor(fix=True)
    assert f"settled: files {work}" in capsys.readouterr().out and not work.exists()
    upkeep.doctor()
    assert "Nothing was left behind" in capsys.readouterr().out
