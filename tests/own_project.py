"""Modules of a project with a network of its own."""

import re
from collections.abc import Mapping
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
(EXAMPLE,) = re.findall(
    r"^```python\n# nets/small.py, in your project\n(.*?)^```$",
    (REPOSITORY / "cnn/networks/README.md").read_text(),
    re.MULTILINE | re.DOTALL,
)
"""The network `Small` of the page about such networks."""


def write(folder: Path, files: Mapping[str, str]) -> None:
    """Writes modules, by their paths in the folder."""
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
