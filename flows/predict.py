"""The prediction flow: writes the classes of any number of images, predicted by a registered model, as a table."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Annotated

from prefect import flow
from pydantic.json_schema import SkipJsonSchema

from flows.run_names import prediction_name
from tasks.orchestration.flow_runs import enter_project
from tasks.prediction.predict import Predictions, predict

MAX_PARAMETER_BYTES = 100_000  # Prefect refuses more than 524 288 bytes, and stores and shows all parameters


@flow(name="predict", flow_run_name=prediction_name, persist_result=False)
def predict_flow(
    model: str, inputs: list[str], out: str, inputs_file: Annotated[str | None, SkipJsonSchema()] = None
) -> Predictions:
    """Predicts the class of every image among the inputs, and writes them as a table.

    Args:
        model: The registered model: `name` (its champion), `name@alias` or `name/version`.
        inputs: Images, folders of images, or s3:// addresses of them.
        out: The table to write, .parquet, .csv or .json; it may be an s3:// address.
        inputs_file: A file that names more inputs, each followed by a NUL byte, as written by `find -print0`.
    """
    enter_project()
    named = Path(inputs_file).read_bytes().split(b"\0") if inputs_file else ()
    return predict(model, [*inputs, *(os.fsdecode(each) for each in named if each)], out)


@contextmanager
def as_parameters(inputs: list[str]) -> Iterator[tuple[list[str], str | None]]:
    """Yields the parameters `inputs` and `inputs_file`; the file is used if names are too long or not Unicode."""
    try:
        fits = len(json.dumps(inputs, ensure_ascii=False).encode()) <= MAX_PARAMETER_BYTES
    except UnicodeEncodeError:  # names of files are bytes
        fits = False
    if fits:
        yield inputs, None
        return
    with NamedTemporaryFile(prefix="convoy-inputs-") as file:
        file.write(b"".join(os.fsencode(each) + b"\0" for each in inputs))
        file.flush()
        yield [], file.name
