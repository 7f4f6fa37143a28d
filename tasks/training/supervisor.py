"""The program between the train task and torchrun: starts the ranks, and ensures that none outlives the task.

    python -m tasks.training.supervisor FOLDER        (see protocol/job.py for the folder; started by train.py)

torchrun puts every rank into a session of its own, so no process group holds them all, and a killed torchrun leaves
its ranks running. So this program adopts orphans, and ends the whole tree below it when its standard input closes.
The kernel closes it however the task ends. If this program is killed, the kernel kills torchrun and its ranks
(`infra.machine.lifeline.die_with_parent`).
"""

import os
import select
import signal
import sys
import traceback
from importlib import import_module
from pathlib import Path

from infra.errors import Outage, ServiceError, UsageError, one_line
from infra.machine.lifeline import adopt_orphans, end_descendants, hear_sigterm_as_end_of_input
from tasks.training.launchers.local import run
from tasks.training.protocol.job import JobFolder, Outcome
from tasks.training.protocol.patience import SUPERVISOR_WAIT


def main() -> int:
    folder = JobFolder(Path(sys.argv[1]))
    adopt_orphans()
    received = hear_sigterm_as_end_of_input()
    try:
        status = launch(folder)
        return 128 + received[0] if received else status
    except (UsageError, ServiceError) as error:
        resumable = isinstance(error, Outage)
        outcome = Outcome(status="failed", error=str(error), exit_status=error.exit_status, resumable=resumable)
        folder.write_outcome(outcome)
        return error.exit_status
    except Exception as error:  # a fault of Convoy's, or of a library's: the training must not seem to have been killed
        traceback.print_exc()
        folder.write_outcome(
            Outcome(status="failed", error=f"{type(error).__name__}: {one_line(error)}", exit_status=1)
        )
        return 1
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        end_descendants(SUPERVISOR_WAIT)


def launch(folder: JobFolder) -> int:
    """Runs a job until its outcome is in the folder; returns an exit status."""
    launcher = folder.read_job().launch.launcher
    if launcher == "local":
        return run(folder, task_wants_end)
    from tasks.training.nodes.coordinator import Coordinator  # it loads boto3

    agents = import_module(f"tasks.training.launchers.{launcher}").agents
    with agents(folder):
        Coordinator(folder).run(lambda: task_wants_end(0.0))
    return 0


def task_wants_end(seconds: float) -> bool:
    """Waits at most the given seconds for standard input to close; returns whether it has."""
    readable, _, _ = select.select([sys.stdin], [], [], seconds)
    return bool(readable) and not os.read(sys.stdin.fileno(), 1)


if __name__ == "__main__":
    sys.exit(main())
