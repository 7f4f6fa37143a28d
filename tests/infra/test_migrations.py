"""Databases of an older or newer MLflow or Prefect than the installed ones."""

import importlib.util
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import httpx
import pytest
from alembic.script import ScriptDirectory

from infra.errors import ServiceError, UsageError
from infra.settings import Settings
from infra.stack.local_stack import down, up
from infra.stack.migrations import BACKUPS_KEPT, DATABASES, Database, migrate
from infra.stack.state import StackFolder
from tests.infra.localstack import S3, own, own_environment, pids

__all__ = ["own", "own_environment"]  # fixtures

pytestmark = pytest.mark.usefixtures("own_environment")

MLFLOW, PREFECT = DATABASES
CREATED = "create table alembic_version (version_num varchar(32)); create table kept (what text); "


def stamped(home: Path, database: Database, revision: str) -> Path:
    """Writes a database with this revision and one row."""
    path = home / database.file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(f"{CREATED} insert into alembic_version values ('{revision}')")
        connection.execute("insert into kept values ('yes')")
        connection.commit()
    return path


def kept(path: Path) -> str:
    with closing(sqlite3.connect(path)) as connection:
        return str(connection.execute("select what from kept").fetchone()[0])


def older(database: Database) -> str:
    """Returns a revision that the library knows and that is not its newest."""
    revisions, newest = database.known()
    return min(revisions - {newest})


@pytest.mark.parametrize("database", DATABASES, ids=lambda database: database.name)
def test_the_newest_revision_is_the_one_that_alembic_finds(database: Database) -> None:
    package = importlib.util.find_spec(database.name)
    assert package and package.origin
    scripts = Path(package.origin).parent / database.scripts
    alembic = ScriptDirectory(str(scripts.parent), version_locations=[str(scripts)])
    revisions, newest = database.known()
    assert alembic.get_heads() == [newest]
    assert {script.revision for script in alembic.walk_revisions()} == revisions


def test_both_databases_are_backed_up_if_one_is_older(tmp_path: Path) -> None:
    stamped(tmp_path, MLFLOW, MLFLOW.known()[1])
    stamped(tmp_path, PREFECT, older(PREFECT))
    events: list[str] = []
    migrate(tmp_path, ["mlflow", "prefect"], events.append)
    backups = sorted((tmp_path / "backups").iterdir())
    assert [path.name.split("-")[0] for path in backups] == ["mlflow", "prefect"]
    assert [path.stem.split("-")[2] for path in backups] == [MLFLOW.known()[1], older(PREFECT)]
    assert [kept(path) for path in backups] == ["yes", "yes"]
    assert [event.split(" to ")[0] for event in events] == [
        "backed up mlflow's database",
        "backed up prefect's database",
        f"migrating prefect's database from schema {older(PREFECT)}",
    ]


def test_nothing_is_backed_up_if_nothing_is_older(tmp_path: Path) -> None:
    for database in DATABASES:
        stamped(tmp_path, database, database.known()[1])
    migrate(tmp_path, ["mlflow", "prefect"], pytest.fail)
    assert not (tmp_path / "backups").exists()
    stamped(tmp_path, PREFECT, older(PREFECT))
    migrate(tmp_path, ["mlflow"], pytest.fail)  # Prefect does not start
    migrate(tmp_path / "new", ["mlflow", "prefect"], pytest.fail)
    assert not (tmp_path / "new").exists()


def test_a_backup_has_what_is_only_in_the_write_ahead_log(tmp_path: Path) -> None:
    path = stamped(tmp_path, PREFECT, older(PREFECT))
    with closing(sqlite3.connect(path)) as writer:  # stays open, as after a killed server
        writer.execute("pragma journal_mode = wal")
        writer.execute("update kept set what = 'newer'")
        writer.commit()
        migrate(tmp_path, ["prefect"], lambda event: None)
        (backup,) = (tmp_path / "backups").iterdir()
        assert kept(backup) == "newer"


def test_only_the_newest_backups_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "backups"
    folder.mkdir()
    old = [folder / f"prefect-2026010{day}T000000-abc.db" for day in range(1, BACKUPS_KEPT + 2)]
    other = folder / "mlflow-20250101T000000-abc.db"
    for path in (*old, other):
        path.write_text("")
    stamped(tmp_path, PREFECT, older(PREFECT))
    migrate(tmp_path, ["prefect"], lambda event: None)
    assert [path.exists() for path in old] == [False, False, *[True] * (BACKUPS_KEPT - 1)]
    assert other.exists()


@pytest.mark.parametrize("database", DATABASES, ids=lambda database: database.name)
def test_a_newer_database_is_refused_in_one_line_and_nothing_is_touched(own: Settings, database: Database) -> None:
    path = stamped(own.home, database, "0123456789ab")
    before = path.read_bytes()
    with pytest.raises(UsageError, match=f"{path} was written by a newer {database.name} .*0123456789ab") as refusal:
        up(own)
    assert "\n" not in str(refusal.value)
    assert path.read_bytes() == before
    assert os.listdir(own.home / database.name) == [path.name]
    assert not any(pids(own).values())
    up(own, only=S3)  # does not use this database


@pytest.mark.long
def test_a_migration_that_fails_leaves_the_database_as_it_was(tmp_path: Path) -> None:
    path = stamped(tmp_path, MLFLOW, "89d4b8295536")  # an early revision, whose tables are missing
    with pytest.raises(ServiceError, match="mlflow's database could not be migrated, and is as it was: ") as failure:
        migrate(tmp_path, ["mlflow"], lambda event: None)
    assert "\n" not in str(failure.value)
    assert kept(path) == "yes"
    assert MLFLOW.revision(tmp_path) == "89d4b8295536"
    assert [kept(backup) for backup in (tmp_path / "backups").iterdir()] == ["yes"]


def test_a_server_of_another_version_is_replaced(own: Settings) -> None:
    folder = StackFolder(own)
    server = folder.server("prefect")
    assert server.version
    assert server.model_copy(update={"version": "3.8.8"}).digest != server.digest


@pytest.mark.slow
def test_an_older_stack_is_migrated_and_keeps_what_it_knew(own: Settings) -> None:
    """The libraries' own migrations create the databases at older revisions."""
    mlflow, prefect = own.home / MLFLOW.file, own.home / PREFECT.file
    for path in (mlflow, prefect):
        path.parent.mkdir(parents=True)
    make_mlflow = (
        "import sys; from alembic import command; from sqlalchemy import create_engine; "
        "from mlflow.store.db.utils import _get_alembic_config; from mlflow.store.tracking.dbmodels.initial_models "
        "import Base; url = 'sqlite:///' + sys.argv[1]; Base.metadata.create_all(create_engine(url)); "
        "command.upgrade(_get_alembic_config(url), sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", make_mlflow, str(mlflow), "534353b11cbc"], check=True)
    make_prefect = ["-m", "prefect", "server", "database", "upgrade", "-y", "-r", "a3b9c7d2e5f1"]
    quiet = {"PREFECT_HOME": str(prefect.parent), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    subprocess.run([sys.executable, *make_prefect], check=True, env=os.environ | quiet)
    with closing(sqlite3.connect(mlflow)) as database:
        columns = "name, artifact_location, lifecycle_stage, creation_time, last_update_time"
        database.execute(f"insert into experiments ({columns}) values ('before', 'mlflow', 'active', 1, 1)")
        database.commit()
    with closing(sqlite3.connect(prefect)) as database:
        database.execute("insert into flow (id, name) values ('9a3ce4bd-6d2a-4a2e-a4a0-47ee6e4f1f0a', 'before')")
        database.commit()

    events: list[str] = []
    endpoints = up(own, events.append)
    assert [event for event in events if event.startswith(("backed up", "migrating"))] == [*events[:4]]
    assert [database.revision(own.home) for database in DATABASES] == [database.known()[1] for database in DATABASES]
    asked = {"filter": "name = 'before'", "max_results": "10"}
    experiments = httpx.get(f"{endpoints.mlflow_tracking_uri}/api/2.0/mlflow/experiments/search", params=asked)
    assert [each["name"] for each in experiments.json()["experiments"]] == ["before"]
    flows = httpx.post(f"{endpoints.prefect_api_url}/flows/filter", json={})
    assert [each["name"] for each in flows.json()] == ["before"]
    down(own)
    up(own, lambda event: events.append(event))
    assert len(list((own.home / "backups").iterdir())) == 2
