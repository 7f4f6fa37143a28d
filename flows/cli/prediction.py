"""Commands that use a registered model: `predict` and `export`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.console import loading, print_line, print_pairs, servers_up
from infra.machine.output import outlive_readers

if TYPE_CHECKING:
    from tasks.prediction.predict import Predictions

MAX_PRINTED = 10  # unreadable files, and classes

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL[@ALIAS|/VERSION]", help="A registered model; a bare name means its champion.")
]


def predict(
    model: ModelArgument,
    inputs: Annotated[list[str], typer.Argument(metavar="FILES|FOLDER|s3://…", help="Images, or folders of them.")],
    out: Annotated[str, typer.Option(help="The table to write: .parquet, .csv or .json (JSON lines); may be s3://.")],
) -> None:
    """Write a table of images with their classes and probabilities.

    For a file that cannot be used, the table holds the reason; the other files are predicted.

    [dim]convoy predict fashion-mnist@champion photos/ --out results.csv[/]
    """
    servers_up()
    with loading():
        from flows.predict import as_parameters, predict_flow
        from tasks.orchestration.progress import show_task_logs

    show_task_logs()
    with outlive_readers("stdout"):
        with as_parameters(inputs) as (named, inputs_file):
            done = predict_flow(model, named, out, inputs_file)
        _print_predictions(done)


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
            "classes": ", ".join(f"{name} {count:,}" for name, count in list(done.classes.items())[:MAX_PRINTED]),
            "table": done.out,
        }
    )


def export(
    model: ModelArgument,
    format: Annotated[str, typer.Option(help="pt2 (torch.export), onnx, or safetensors (weights with a description).")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The file to write.")],
) -> None:
    """Write a model to a file, after checking that it gives the same answers as the registered one.

    The file carries class names, input, temperature, version, and an example from an image to a class.

    [dim]convoy export fashion-mnist --format onnx --out fashion.onnx[/]
    """
    servers_up()
    with loading():
        from tasks.prediction.export import export as write

    done = write(model, format, out)  # type: ignore[arg-type]  # it refuses unknown formats
    print_pairs(
        {
            "model": done.model,
            "file": f"{done.out} ({done.bytes:,} bytes)",
            "SHA-256": done.sha256,
            "checked": f"on {done.images} images; largest difference of a probability {done.largest_difference:.1e}",
            "carries": f"classes, input, temperature {done.temperature:g} (not applied), version, example of use",
        }
    )
