"""The code digest follows what code does, not how it looks."""

import gc
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import cnn
from cnn.code_digest import code_digest

ORIGINAL = '''
"""Module."""

LIMIT = 3
"""Why three."""


class Box:
    """A box."""

    def area(self, width, height):
        """Pixels."""
        return width * height  # of the outside
'''

REFORMATTED = '''
# another licence header
LIMIT = 3

class Box:
    """A box, described
    at length."""
    def area(
        self,
        width, height,
    ):
        return (width
                * height)
'''


def digest_of(folder: Path, source: str, name: str = "box.py") -> str:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(source)
    return code_digest([folder / name])


def test_comments_docstrings_and_formatting_do_not_count(tmp_path: Path) -> None:
    assert digest_of(tmp_path, ORIGINAL) == digest_of(tmp_path, REFORMATTED)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("width * height", "width + height"),
        ("LIMIT = 3", "LIMIT = 4"),
        ("LIMIT = 3", "LIMIT = '3'"),
        ("width, height", "height, width"),
    ],
)
def test_a_change_of_behaviour_counts(tmp_path: Path, old: str, new: str) -> None:
    assert digest_of(tmp_path, ORIGINAL) != digest_of(tmp_path, ORIGINAL.replace(old, new))


def test_neither_order_nor_place_of_the_files_counts_but_their_names_do(tmp_path: Path) -> None:
    files = []
    for root in ("here", "there"):
        for name in ("a.py", "part/b.py"):
            file = tmp_path / root / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"NAME = {name!r}")
            files.append(file)
    here, there = files[:2], files[2:]
    assert code_digest(here) == code_digest(reversed(there))
    renamed = there[1].rename(there[1].with_name("c.py"))
    assert code_digest(here) != code_digest([there[0], renamed])


def test_statements_that_move_between_files_count(tmp_path: Path) -> None:
    for folder, first, second in (("one", "A = 1\nB = 2", ""), ("two", "A = 1", "B = 2")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.py").write_text(first)
        (tmp_path / folder / "y.py").write_text(second)
    assert code_digest((tmp_path / "one").iterdir()) != code_digest((tmp_path / "two").iterdir())


def test_threads_get_the_same_digest_at_the_same_time() -> None:
    """Python 3.11's parser fails if another thread uses it meanwhile, as while a collection of garbage runs code."""
    files = sorted(Path(cnn.__file__).parent.rglob("*.py"))[:20]
    expected = code_digest(files)
    threshold = gc.get_threshold()

    def switch_threads(*_: object) -> None:
        time.sleep(0)

    gc.callbacks.append(switch_threads)
    gc.set_threshold(50)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(code_digest, [files] * 8)) == [expected] * 8
    finally:
        gc.callbacks.remove(switch_threads)
        gc.set_threshold(*threshold)
