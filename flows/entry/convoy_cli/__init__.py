"""The target of the `convoy` script: a package with a unique name that makes Python find Convoy's other packages.

Convoy's packages have common names. PYTHONPATH, a `.pth` file or the working folder may hold modules of the same names,
such as Invoke's `tasks.py`.
"""

import importlib.util
import os
import sys
from pathlib import Path

PACKAGES = ("cnn", "infra", "tasks", "flows")


def main() -> None:
    """Runs the command line with Convoy's own packages, in this process and its child processes."""
    use_own_packages()
    from flows.cli import main as run

    run()


def use_own_packages() -> Path:
    """Makes Python find Convoy's own packages first; child processes never search the working folder.

    Returns:
        The folder that holds them.
    """
    os.environ["PYTHONSAFEPATH"] = "1"
    here = Path(__file__).resolve()
    roots = (here.parents[1], here.parents[3])  # of an installation, and of the repository
    root = next(folder for folder in roots if (folder / "flows" / "cli" / "__init__.py").is_file())
    if all(_is_found_in(root, name) for name in PACKAGES):
        return root
    sys.path.insert(0, str(root))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    return root


def _is_found_in(root: Path, name: str) -> bool:
    spec = importlib.util.find_spec(name)
    folders = spec.submodule_search_locations if spec else None
    return [Path(folder).resolve() for folder in folders or ()] == [root / name]
