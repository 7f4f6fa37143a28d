"""Backs up and migrates the local MLflow's and Prefect's databases after an upgrade of either library.

Both keep a SQLite database whose schema has a revision (alembic's). If one schema is older than the installed
library's, both databases are copied before any change: an MLflow run names its Prefect flow run, so they must be
restored together. A database with a newer schema is refused. MLflow and Prefect are not imported: the revisions that a
library knows are read from its migration files, which takes about ten milliseconds.
"""

import importlib.util
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Collection
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from infra.errors import ServiceError, UsageError
from infra.machine.files import temporary_file

BACKUPS_KEPT = 5  # per database
REVISION = re.compile(r"^revision\b[^=\n]*= *[\"'](\w+)[\"']", re.MULTILINE)
DOWN_REVISION = re.compile(r"^down_revision\b[^=\n]*= *(.+)$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Database:
    """The database of one local server.

    Attributes:
        name: the name of the server and of its library.
        file: the SQLite file, relative to the state folder.
        scripts: the folder of the library's migrations, relative to its package.
        upgrade: arguments of the library's migration command; empty if the server migrates when it starts.
    """

    name: str
    file: str
    scripts: str
    upgrade: tuple[str, ...] = ()

    def revision(self, home: Path) -> str | None:
        """Returns the revision of the database, or None if the database does not exist or cannot be read."""
        path = home / self.file
        if not path.exists():
            return None
        try:
            with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
                row = database.execute("select version_num from alembic_version").fetchone()
        except sqlite3.DatabaseError:
            return None  # its server reports what is wrong with it
        return str(row[0]) if row else None

    def known(self) -> tuple[set[str], str]:
        """Returns all revisions that the installed library knows, and the newest one."""
        package = importlib.util.find_spec(self.name)  # finds a top-level package without importing it
        assert package and package.origin
        scripts = [path.read_text() for path in (Path(package.origin).parent / self.scripts).glob("*.py")]
        revisions = {found[1] for text in scripts if (found := REVISION.search(text))}
        earlier = " ".join(found[1] for text in scripts if (found := DOWN_REVISION.search(text)))
        (newest,) = revisions - set(re.findall(r"\w+", earlier))
        return revisions, newest


DATABASES = (
    Database(
        name="mlflow",
        file="mlflow/mlflow.db",
        scripts="store/db_migrations/versions",
        upgrade=("mlflow", "db", "upgrade"),
    ),
    Database(name="prefect", file="prefect/prefect.db", scripts="server/database/_migrations/versions/sqlite"),
)


def outdated(home: Path, names: Collection[str]) -> list[tuple[Database, str, str]]:
    """Returns the databases whose schema is older than the installed library's, with their revision and the newest.

    Args:
        home: the state folder.
        names: the servers whose databases are checked.

    Raises:
        UsageError: a database has a revision that the installed library does not know: a newer one wrote it.
    """
    found = []
    for database in DATABASES:
        if database.name in names and (revision := database.revision(home)):
            revisions, newest = database.known()
            if revision not in revisions:
                raise UsageError(
                    f"{home / database.file} was written by a newer {database.name} (its schema {revision} is unknown "
                    "to the installed one): use the newer Convoy, or another CONVOY_HOME"
                )
            if revision != newest:
                found.append((database, revision, newest))
    return found


def migrate(home: Path, names: Collection[str], on_event: Callable[[str], None]) -> None:
    """Backs up both databases if one has an older schema; migrates those that their server does not migrate itself.

    Call it while the servers `names` do not run, before they start.

    Raises:
        ServiceError: a backup or a migration failed; the databases are unchanged.
        UsageError: see `outdated`.
    """
    old = outdated(home, names)
    if not old:
        return
    backups = {database: _back_up(database, home, on_event) for database in DATABASES if database.revision(home)}
    for database, revision, newest in old:
        who = "" if database.upgrade else ", which the server does while it starts"
        on_event(f"migrating {database.name}'s database from schema {revision} to {newest}{who}")
        if database.upgrade:
            path = (home / database.file).absolute()
            command = [sys.executable, "-m", *database.upgrade, f"sqlite:///{path}"]
            done = subprocess.run(command, cwd=path.parent, capture_output=True, text=True)
            if done.returncode:
                _copy(backups[database], path)
                reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise ServiceError(f"{database.name}'s database could not be migrated, and is as it was: {reason}")


def _back_up(database: Database, home: Path, on_event: Callable[[str], None]) -> Path:
    """Copies a database, consistently even while a server writes to it; deletes all but the newest backups."""
    folder = home / "backups"
    at = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    backup = folder / f"{database.name}-{at}-{database.revision(home)}.db"
    try:
        with temporary_file(folder) as part:
            _copy(home / database.file, part)
            part.replace(backup)
    except (OSError, sqlite3.Error) as error:
        raise ServiceError(f"{home / database.file} cannot be backed up before its migration: {error}") from None
    for path in sorted(folder.glob(f"{database.name}-*.db"))[:-BACKUPS_KEPT]:
        path.unlink(missing_ok=True)
    on_event(f"backed up {database.name}'s database to {backup}")
    return backup


def _copy(source: Path, target: Path) -> None:
    with closing(sqlite3.connect(source)) as old, closing(sqlite3.connect(target)) as new:
        old.backup(new)
