"""The command `init`, which begins a project."""

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.console import print_line
from infra.errors import UsageError
from tasks.config.project import FILE, NETWORK_FILE, STARTER_NETWORK


def init(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Is created if it is missing.")] = Path("."),
) -> None:
    """Begin a project: write a commented convoy.yaml and a module with a network of your own, my_network.py.

    The commands train, sweep, retrain, trial, config and deploy, and for names of columns data check and errors, read
    the convoy.yaml of the folder in which they are called.

    [dim]convoy init flowers[/]
    """
    from tasks.config.explain import starter

    contents = {folder / FILE: starter(), folder / NETWORK_FILE: STARTER_NETWORK.read_text(encoding="utf-8")}
    if there := [str(file) for file in contents if os.path.lexists(file)]:
        raise UsageError(f"already there: {', '.join(there)}; nothing was written")
    created: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in contents.items():
            with file.open("x", encoding="utf-8") as opened:
                created.append(file)
                opened.write(text)
    except OSError as error:
        for file in created:
            file.unlink()
        raise UsageError(f"cannot write {error.filename or folder}: {error.strerror}") from None
    for file in contents:
        print_line(f"wrote {file}")
    there_first = "" if folder == Path(".") else f"cd {shlex.quote(str(folder))} && "
    print_line(f"next: {there_first}convoy train   (set dataset in {FILE} first, to train on your own images)")
