"""Convoy for Python programs: `import convoy`, then `convoy.train(dataset="photos/", epochs=20)`.

This package has a unique name, since the names of Convoy's other packages are common: a program that has a package
`tasks` of its own can import this one, but then `import tasks` in that program gives Convoy's.
"""

import sys
from pathlib import Path

from convoy_cli import PACKAGES, use_own_packages  # type: ignore[import-not-found]

_root = use_own_packages()
for _name in PACKAGES:
    _file = getattr(sys.modules.get(_name), "__file__", None)
    if _name in sys.modules and (_file is None or Path(_file).resolve().parent != _root / _name):
        raise ImportError(f"{_name} ({_file}) is loaded, and Convoy has a package of that name: import convoy first")

from cnn.errors import InputError  # noqa: E402
from flows.interface import compare, predict, promote, retrain, train  # noqa: E402
from flows.summary import Refused, Summary  # noqa: E402
from infra.errors import GateRefused, Outage, ServiceError, UsageError  # noqa: E402

__all__ = [
    "GateRefused",
    "InputError",
    "Outage",
    "Refused",
    "ServiceError",
    "Summary",
    "UsageError",
    "compare",
    "predict",
    "promote",
    "retrain",
    "train",
]
