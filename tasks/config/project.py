"""The project: its folder, and its file `convoy.yaml`. Imports nothing slow."""

import os
from pathlib import Path

FILE = "convoy.yaml"
NETWORK_FILE = "my_network.py"
STARTER_NETWORK = Path(__file__).parent / "starter" / NETWORK_FILE


def project_file() -> Path | None:
    """Returns the `convoy.yaml` of the project, which is the working folder; None if there is none.

    A flow run of a project's deployment works in its worker's working folder, which is then the project there.
    """
    return Path(FILE) if os.path.lexists(FILE) else None  # a broken link is refused later
