"""The program that serves a registered model over HTTP until its standard input closes; tasks/consumers.py starts it.

    python -m tasks.modelserver MODEL_URI PORT

It runs `mlflow models serve` on 127.0.0.1. However the process that started this one ends, the kernel closes the pipe,
and the server goes with all that it has started.
"""

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

from tasks.lifeline import adopt_orphans, dying_with_this_process, end_descendants, hear_sigterm_as_end_of_input

PATIENCE = 3.0  # seconds that the server has to end by itself
POLL = 0.2  # seconds


def main() -> int:
    uri, port = sys.argv[1:]
    adopt_orphans()
    hear_sigterm_as_end_of_input()
    # MLflow starts `uvicorn` by that name.
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    command = ["models", "serve", "--model-uri", uri, "--env-manager", "local", "--host", "127.0.0.1", "--port", port]
    try:
        server = subprocess.Popen(
            [sys.executable, "-P", "-m", "mlflow", *command],
            stdin=subprocess.DEVNULL,
            env=os.environ | {"PATH": path},
            preexec_fn=dying_with_this_process(),
        )
        while server.poll() is None:
            if select.select([sys.stdin], [], [], POLL)[0]:
                return 0
        return server.returncode or 1  # it was not told to end
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        end_descendants(PATIENCE)


if __name__ == "__main__":
    sys.exit(main())
