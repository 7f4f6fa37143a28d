"""Runs a flow run of a worker with the code of a commit: its files, and the packages of its lock file.

python -m flows.at_commit        in place of `python -m prefect.engine`; reads CONVOY_REPOSITORY and CONVOY_COMMIT
"""

import os
import signal
import sys
from functools import partial
from uuid import UUID

from prefect import get_client
from prefect.states import Failed

from infra.errors import UsageError
from infra.machine.checkouts import Checkout, check_out
from infra.settings import Settings
from infra.tracking.provenance import COMMIT_VARIABLE
from infra.tracking.tags import COMMIT
from tasks.orchestration.outage import through_outage

MAX_OUTAGE_SECONDS = 600.0  # of the git repository or the package index
FLOW_RUN_VARIABLE = "PREFECT__FLOW_RUN_ID"  # which Prefect sets for the process of a flow run
COMMAND = "python -m flows.at_commit"
REPOSITORY_VARIABLE = "CONVOY_REPOSITORY"


def main() -> None:
    """Becomes the flow run's process; a mistake ends the flow run as Failed, an outage as Crashed, so it is resumed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to this process too; the worker handles it
    flow_run_id = UUID(os.environ[FLOW_RUN_VARIABLE])
    settings = Settings()
    repository = os.environ.get(REPOSITORY_VARIABLE) or str(settings.project or os.getcwd())
    try:
        checking_out = partial(check_out, settings.home / "code", repository, os.environ[COMMIT_VARIABLE])
        found = through_outage(checking_out, print, MAX_OUTAGE_SECONDS)
    except UsageError as error:
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(flow_run_id, Failed(message=f"the code: {error}"), force=True)
        return
    with get_client(sync_client=True) as client:
        client.update_flow_run_labels(flow_run_id, {COMMIT: found.commit})
    os.environ.update(_variables(found))
    sys.stdout.flush()
    os.execv(found.python, [str(found.python), "-m", "prefect.engine"])


def _variables(found: Checkout) -> dict[str, str]:
    """Returns the environment of the flow run: Convoy's own repository is the code, another one is the project."""
    variables = {COMMIT_VARIABLE: found.commit, "PYTHONSAFEPATH": "1", "VIRTUAL_ENV": str(found.python.parents[1])}
    if all((found.tree / package / "__init__.py").exists() for package in ("cnn", "infra", "tasks", "flows")):
        return variables | {"PYTHONPATH": str(found.tree)}
    return variables | {"CONVOY_PROJECT": str(found.tree), "PYTHONPATH": ""}


if __name__ == "__main__":
    main()
