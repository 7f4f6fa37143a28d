"""Serves a registered model over HTTP until its standard input closes; clients.py starts this program.

    python -m tasks.release.serving.http_server     (reads the line {"uri": …, "port": …} from its standard input)

It runs `mlflow models serve` on 127.0.0.1, whose libraries load before that line arrives. However the process that
started this one ends, the kernel closes the pipe, and the server ends with all its child processes.
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

STOP_SECONDS = 3.0  # after them, a server that has not ended is killed
POLL_SECONDS = 0.2
SERVE = "import json, sys; from mlflow.models.cli import commands; commands(json.loads(sys.stdin.read()))"
"""`mlflow models` with arguments from its standard input, without the rest of MLflow's command line: that takes as long
to load as MLflow."""


def main() -> int:
    adopt_orphans()
    hear_sigterm_as_end_of_input()
    # MLflow looks `uvicorn` up on the path.
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
            if select.select([sys.stdin], [], [], POLL_SECONDS)[0]:
                line = sys.stdin.readline()
                if not line:
                    return 0
                _serve(server, **json.loads(line))
        return server.returncode or 1  # it ended by itself
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        end_descendants(STOP_SECONDS)


def _serve(server: subprocess.Popen[str], uri: str, port: int) -> None:
    options = ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    assert server.stdin
    with suppress(BrokenPipeError), server.stdin:  # it may have ended
        json.dump(["serve", "--model-uri", uri, *options], server.stdin)


if __name__ == "__main__":
    sys.exit(main())
