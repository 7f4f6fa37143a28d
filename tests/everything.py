"""Runs the default suite, then each marker as a whole, and prints one table; exits with status 1 if anything failed.

python -m tests.everything [MARKER...]       (`make test-all`)
"""

import argparse
import re
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import xml.etree.ElementTree as xml
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).parents[1]
DEFAULT = "default"


def markers() -> list[str]:
    """All of pyproject.toml, after the default suite; the longest last."""
    options = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    names = [re.split(r"\W", marker)[0] for marker in options["markers"]]
    return [DEFAULT, *sorted(names, key=["slow", "faults"].__contains__)]


def run(marker: str) -> tuple[int, Counter[str], float]:
    """Runs the tests of a marker; returns pytest's exit status, its report's counts, and seconds."""
    with tempfile.TemporaryDirectory() as folder:
        report, began = Path(folder, "report.xml"), time.monotonic()
        chosen = [] if marker == DEFAULT else ["-m", marker]
        chosen += ["-n", "2"] if marker in (DEFAULT, "long") else []
        tests = subprocess.Popen([sys.executable, "-m", "pytest", *chosen, f"--junitxml={report}"])
        signal.signal(signal.SIGTERM, lambda *_: tests.terminate())
        signal.signal(signal.SIGINT, lambda *_: None)  # the terminal tells the tests too, which end what they started
        status = tests.wait()
        suites = xml.parse(report).getroot().iter("testsuite") if report.exists() else ()
        counts = Counter[str]()
        for suite in suites:
            for kind in ("tests", "failures", "errors", "skipped"):
                counts[kind] += int(suite.get(kind, 0))
    return status, counts, time.monotonic() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("markers", nargs="*", metavar="MARKER", help=f"only these, of {', '.join(markers())}")
    asked = parser.parse_args().markers or markers()
    if unknown := set(asked) - set(markers()):
        parser.error(f"there is no marker {', '.join(unknown)}")
    table = Table("tests", "passed", "failed", "skipped", "minutes", box=None)
    failed = False
    for marker in asked:
        status, counts, seconds = run(marker)
        wrong = counts["failures"] + counts["errors"]
        failed |= status not in (0, 5)  # 5: none was found
        passed = counts["tests"] - wrong - counts["skipped"]
        table.add_row(marker, *map(str, (passed, wrong, counts["skipped"])), f"{seconds / 60:.1f}")
        if status == 2:  # interrupted, or the tests cannot be imported
            break
    Console().print(table)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
