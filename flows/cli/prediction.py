"""Commands for those who use a registered model: `predict` and `export`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.console import loading, print_pairs, say, servers_up
from infra.machine.output import outlive_readers

if TYPE_CHECKING:
    from tasks.prediction.predict import Predictions

SHOWN = 10  # unreadable files

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL[@ALIAS|/VERSION]", help="A registered model; without more, its champion.")
]


def predict(
    model: ModelArgument,
    inputs: Annotated[list[str], typer.Argument(metavar="FILES|FOLDER|s3://…", help="Images, or folders of them.")],
    out: Annotated[str, typer.Option(help="The table to write: .parquet, .csv or .json (JSON lines); may be s3://.")],
) -> None:
    """Write a table of images with their classes and probabilities.

    A file that cannot be used has its reason in the table, and stops nothing.

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
        for each in done.unreadable_examples[:SHOWN]:
            say(f"not used: {each.file}: {each.reason}", error=True)
        if done.unreadable > SHOWN:
            say(f"not used: {done.unreadable - SHOWN} more; see column error", error=True)
    print_pairs(
        {
            "model": done.model,
            "images": f"{done.images - done.unreadable:,}, unreadable {done.unreadable:,}",
            "classes": ", ".join(f"{name} {count:,}" for name, count in list(done.classes.items())[:SHOWN]),
            "table": done.out,
        }
    )


def export(
    model: ModelArgument,
    format: Annotated[str, typer.Option(help="pt2 (torch.export), onnx, or safetensors (weights, described).")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The file to write.")],
) -> None:
    """Write a model to a file, after checking that it gives what the registered one gives.

    [dim]convoy export fashion-mnist --format onnx --out fashion.onnx[/]
    """
    servers_up()
    with loading():
        from tasks.prediction.export import export as write

    done = write(model, format, out)  # type: ignore[arg-type]  # it refuses what is no format
    print_pairs(
        {
            "model": done.model,
            "file": f"{done.out} ({done.bytes:,} bytes)",
            "SHA-256": done.sha256,
            "checked": f"on {done.images} images; largest difference of a probability {done.largest_difference:.1e}",
        }
    )
