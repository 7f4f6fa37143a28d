"""The program that serves a registered model over HTTP until its standard input closes; clients.py starts it.

    python -m tasks.release.serving.http_server     (the line {"uri": …, "port": …} comes on its standard input)

It runs `mlflow models serve` on 127.0.0.1, which loads its libraries before it is told what to do. However the process
that started this one ends, the kernel closes the pipe, and the server goes with all that it has started.
"""

import json
import os
import select
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from infra.machine.lifeline import adopt_orphans, dying_with_this_process, end_descendants, hear_sigterm_as_end_of_input

PATIENCE = 3.0  # seconds that the server has to end by itself
POLL = 0.2  # seconds
SERVE = "import json, sys; from mlflow.models.cli import commands; commands(json.loads(sys.stdin.read()))"
"""`mlflow models` with arguments from its standard input; without the rest of MLflow's command line, which takes as
long to load as MLflow."""


def main() -> int:
    adopt_orphans()
    hear_sigterm_as_end_of_input()
    # MLflow starts `uvicorn` by that name.
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    try:
        server = subprocess.Popen(
            [sys.executable, "-P", "-c", SERVE],
            stdin=subprocess.PIPE,
            env=os.environ | {"PATH": path},
            preexec_fn=dying_with_this_process(),
            text=True,
        )
        while server.poll() is None:
            if select.select([sys.stdin], [], [], POLL)[0]:
                line = sys.stdin.readline()
                if not line:
                    return 0
                _tell(server, **json.loads(line))
        return server.returncode or 1  # it was not told to end
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        end_descendants(PATIENCE)


def _tell(server: subprocess.Popen[str], uri: str, port: int) -> None:
    place = ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    assert server.stdin
    with suppress(BrokenPipeError), server.stdin:  # it may have ended
        json.dump(["serve", "--model-uri", uri, *place], server.stdin)


if __name__ == "__main__":
    sys.exit(main())
