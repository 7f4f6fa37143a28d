"""Commands about data: `data show`, `data diff` and `data check`."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from flows.cli.console import (
    JsonOption,
    configuration_file,
    print_json,
    print_line,
    print_pairs,
    print_whole,
    servers_to_read,
)
from flows.cli.options import set_option
from infra.errors import UsageError, counted, escaped
from infra.machine.files import check_writable

MOST_PRINTED = 20  # changes
MOST_VALUES = 5  # of a column

app = typer.Typer(no_args_is_help=True, help="Look into dataset versions: which images they hold, and what differs.")

SetOption = Annotated[
    list[str] | None,
    set_option("A key of `data`: -s data.columns.label=class. Repeatable."),
]
DATASET_HELP = "The beginning of a dataset version, a run's id, or a model: NAME, NAME@ALIAS or NAME/VERSION."


@app.command()
def show(
    dataset: Annotated[str, typer.Argument(metavar="DATA", help=DATASET_HELP)],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a row per image as CSV: split, label, path, columns.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show classes, splits, groups and columns of a dataset version; with --out, every image with its file.

    Starts no server: `convoy up` does.

    [dim]convoy data show my-photos --out images.csv[/]
    """
    if out:
        check_writable(out, "--out")
    servers_to_read()
    from infra.storage.object_store import open_bucket
    from tasks.data.dataset_diff import index_of
    from tasks.data.description import describe
    from tasks.training.runs.run_record import find_dataset

    store = open_bucket()
    version = find_dataset(store, dataset)
    index = index_of(store, version)
    found = describe(store, version, index)
    if out:
        index.write_csv(out)
    if as_json:
        print_json(found)
        return
    table = Table("class", *found.splits, box=None)
    for name, counts in found.classes.items():
        table.add_row(name, *(f"{count:,}" for count in counts.values()))
    print_whole(table)
    facts = {
        "version": version,
        "images": ", ".join(f"{split} {count:,}" for split, count in found.splits.items()),
        "pixels": f"{found.channels} x {found.image_size} x {found.image_size}",
    }
    if found.groups:
        facts["groups"] = f"{found.groups:,}"
    for column, values in found.columns.items():
        named = ", ".join(f"{escaped(value)} {count:,}" for value, count in list(values.items())[:MOST_VALUES])
        more = f" and {counted(len(values) - MOST_VALUES, 'more value')}" if len(values) > MOST_VALUES else ""
        facts[f"column {column}"] = named + more
    print_pairs(facts)
    if out:
        print_line(f"{counted(index.table.num_rows, 'image')} in {out}")


@app.command()
def check(
    table: Annotated[Path, typer.Argument(help="A .csv, .tsv, .jsonl or .parquet; or a folder with metadata.csv.")],
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check a label table, and list every row that is faulty or whose file is missing. Starts no server.

    The names of its columns are those of convoy.yaml, if it is here, or of --set.

    [dim]convoy data check labels.csv --set data.columns.label=class[/]
    """
    from infra.sources.entries import METADATA, is_table
    from infra.sources.label_table import FaultyTable, header_of, read_table
    from tasks.config.deployment import load_project
    from tasks.data.label_tables import missing_files, table_options

    options = table_options(load_project(configuration_file(None), settings or ()).data)
    if beside := os.path.isdir(table):
        folder, table = table, table / METADATA
        if not os.path.isfile(table) or not options.are_in(header_of(table, METADATA)):
            has = f"{folder} has no {METADATA} about its images"
            raise UsageError(f"{has}; a training checks the images of a folder before it begins")
    if not is_table(table.name) or not os.path.isfile(table):
        raise UsageError(f"{table}: there is no such label table (.csv, .tsv, .jsonl, .parquet)")
    try:
        found = read_table(table, table.name, options, labelled=not beside, in_bucket=beside)  # as a training reads it
    except FaultyTable as faulty:
        if as_json:
            print_json({"faults": faulty.faults, "missing": []})
        else:
            print_line("\n".join(faulty.faults))
        raise UsageError(f"{table}: {counted(faulty.count, 'fault')}; correct the table") from None
    missing = missing_files(found, table)
    if as_json:
        print_json({"faults": [], "missing": [{"row": row, "path": path} for row, path in missing]})
    elif missing:
        print_line("\n".join(f"row {row}: no file {path}" for row, path in missing))
    if missing:
        raise UsageError(f"{table}: {len(missing):,} of its {counted(len(found), 'file')} cannot be read")
    if as_json:
        return
    named = set(filter(None, found.values("label") or ()))
    labels = f", {counted(len(named), 'label')}" if named else ""
    columns = f", columns {', '.join(found.columns)}" if found.columns else ""
    print_line(f"{counted(len(found), 'row')}{labels}{columns}: no fault")


@app.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help=f"The earlier one. {DATASET_HELP}")],
    b: Annotated[str, typer.Argument(metavar="B", help="The later one, likewise.")],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write all changes as CSV.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what differs between two dataset versions: images added, removed, renamed, relabelled, moved between splits.

    Starts no server: `convoy up` does.

    [dim]convoy data diff my-photos/1 my-photos/2[/]
    """
    if out:
        check_writable(out, "--out")
    servers_to_read()
    from infra.storage.object_store import open_bucket
    from tasks.data.dataset_diff import differences, index_of, summary, write_changes
    from tasks.training.runs.run_record import find_dataset

    store = open_bucket()
    changes = differences(*(index_of(store, find_dataset(store, each)) for each in (a, b)))
    if out:
        write_changes(changes, out)
    if as_json:
        print_json([change._asdict() for change in changes])
        return
    print_line(summary(changes))
    table = Table("change", "file", "earlier", "later", box=None)
    for change in changes[:MOST_PRINTED]:
        table.add_row(*(value[:40] if change.kind == "changed" else value for value in change))
    if changes:
        print_whole(table)
    if len(changes) > MOST_PRINTED:
        print_line(f"and {len(changes) - MOST_PRINTED:,} more; --out FILE writes all")
