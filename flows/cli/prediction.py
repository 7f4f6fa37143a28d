"""Commands that use a registered model: `predict`, `errors` and `export`."""

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.console import (
    JsonOption,
    configuration_file,
    loading,
    print_json,
    print_line,
    print_pairs,
    servers_to_read,
    servers_up,
)
from infra.errors import UsageError, counted
from infra.machine.files import check_writable
from infra.machine.output import outlive_readers

if TYPE_CHECKING:
    from tasks.prediction.corrections import Corrected
    from tasks.prediction.label_errors_page import FoundLabelErrors
    from tasks.prediction.predict import Predictions

MAX_PRINTED = 10  # unreadable files, and classes

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL[@ALIAS|/VERSION]", help="A registered model; a bare name means its champion.")
]


def predict(
    model: ModelArgument,
    inputs: Annotated[list[str], typer.Argument(metavar="FILES|FOLDER|s3://…", help="Images, or folders of them.")],
    out: Annotated[str, typer.Option(help="The table to write: .parquet, .csv or .json (JSON lines); may be s3://.")],
    as_json: JsonOption = False,
) -> None:
    """Write a table of images with their classes and probabilities.

    For a file that cannot be used, the table holds the reason; the other files are predicted. In a folder, those files
    count whose names end in .png, .jpg, .jpeg, .jfif, .webp or .bmp.

    [dim]convoy predict fashion-mnist@champion photos/ --out results.csv[/]
    """
    with outlive_readers("stdout"):
        done = write_predictions(model, inputs, out)
        if as_json:
            print_json(done)
        else:
            _print_predictions(done)


def write_predictions(model: str, inputs: list[str], out: str) -> "Predictions":
    """Does what `predict` describes, with its servers."""
    servers_up()
    with loading():
        from flows.predict import as_parameters, predict_flow
        from tasks.orchestration.progress import show_task_logs

    show_task_logs()
    with as_parameters(inputs) as (named, inputs_file):
        return predict_flow(model, named, out, inputs_file)


def _print_predictions(done: "Predictions") -> None:
    if done.unreadable:
        for each in done.unreadable_examples[:MAX_PRINTED]:
            print_line(f"not used: {each.file}: {each.reason}", error=True)
        if done.unreadable > MAX_PRINTED:
            print_line(f"not used: {done.unreadable - MAX_PRINTED} more; see column error", error=True)
    print_pairs(
        {
            "model": done.model,
            "images": f"{done.images - done.unreadable:,}, unreadable {done.unreadable:,}",
            "classes": ", ".join(f"{name}: {count:,}" for name, count in list(done.classes.items())[:MAX_PRINTED]),
            "table": done.out,
        }
    )


def errors(
    model: ModelArgument,
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="The table to write: .csv. A page of pictures, .html, lies beside it.")
    ],
    corrected: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write to --out the labels of all images, as corrected in this table."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a table of images whose label is probably wrong, the worst first, and a page to look through.

    All images that the version was trained and evaluated on are judged. Correct the column label where the model is
    right; --corrected then writes a label table of all images, to train on. Starts no server: `convoy up` does.

    [dim]convoy errors photos --out errors.csv[/]
    [dim]convoy errors photos --corrected errors.csv --out photos/labels.csv[/]
    """
    from tasks.prediction.corrections import read_corrections, write_corrected

    if out.suffix.lower() != ".csv":
        raise UsageError(f"--out {out}: its name must end with .csv")
    check_writable(out, "--out")
    if corrected:
        if os.path.exists(out) and os.path.exists(corrected) and os.path.samefile(out, corrected):
            raise UsageError(f"--out {out} would replace the table of --corrected; name another file")
        corrections = read_corrections(corrected)  # before boto3 is loaded, so that a mistake is told at once
        from tasks.config.deployment import load_project
        from tasks.data.label_tables import table_options

        options = table_options(load_project(configuration_file(None)).data)  # as the next training reads the table
        servers_to_read()
        written = write_corrected(model, corrections, out, options)
        if as_json:
            print_json(written)
        else:
            _print_corrected(written, out)
        return
    check_writable(out.with_suffix(".html"), "the page of --out")
    servers_to_read()
    with loading():
        from tasks.prediction.label_errors import write_label_errors

    found = write_label_errors(model, out)
    if as_json:
        print_json(found)
    else:
        _print_label_errors(found)


def _print_corrected(written: "Corrected", table: Path) -> None:
    print_pairs(
        {
            "model": written.model,
            "labels": f"{counted(written.images, 'image')}, {counted(written.changed, 'label')} changed",
            "table": str(table),
            "to train": shlex.join(("convoy", "train", "--dataset", str(table), "--name", written.name)),
        }
    )
    if written.missing:
        print_line(
            f"before you train, move {table.name} to the folder from which its paths begin: there is no "
            f"{table.parent / written.missing}",
            error=True,
        )


def _print_label_errors(found: "FoundLabelErrors") -> None:
    print_pairs(
        {
            "model": found.model,
            **{
                split: f"{counted(images, 'image')}, {counted(found.suspects[split], 'label')} probably wrong"
                + (" (seen in training)" if split == "train" else "")
                for split, images in found.images.items()
            },
            "table": str(found.table),
            "page": str(found.page),
        }
    )
    if not found.named:
        print_line("images are named by split and position: their dataset version has no file names", error=True)


def export(
    model: ModelArgument,
    format: Annotated[str, typer.Option(help="pt2 (torch.export), onnx, or safetensors (weights with a description).")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The file to write.")],
    as_json: JsonOption = False,
) -> None:
    """Write a model to a file, after checking that it gives the same answers as the registered one.

    The file carries class names, input, temperature, version, and an example from an image to a class.

    [dim]convoy export fashion-mnist --format onnx --out fashion.onnx[/]
    """
    servers_up()
    with loading():
        from tasks.prediction.export import export as write

    done = write(model, format, out)  # type: ignore[arg-type]  # it refuses unknown formats
    if as_json:
        print_json(done)
        return
    print_pairs(
        {
            "model": done.model,
            "file": f"{done.out} ({done.bytes:,} bytes)",
            "SHA-256": done.sha256,
            "checked": f"on {counted(done.images, 'image')}; largest difference of a probability "
            f"{done.largest_difference:.1e}",
            "carries": f"classes, input, temperature {done.temperature:g} (not applied), version, example of use",
        }
    )
