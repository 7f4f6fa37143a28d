"""The prediction flow: writes the classes of any number of images, predicted by a registered model, as a table."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile

from prefect import flow

from tasks.prediction.predict import Predictions, predict

MAX_PARAMETER_BYTES = 100_000  # Prefect refuses more than 524 288 bytes, and stores and shows all parameters


@flow(name="predict", flow_run_name="{model}", persist_result=False)
def predict_flow(model: str, inputs: list[str], out: str, inputs_file: str | None = None) -> Predictions:
    """Predicts the class of every image among the inputs; for the arguments see `tasks.prediction.predict.predict`.

    Args:
        inputs_file: a file that names more inputs, each followed by a NUL byte, as written by `find -print0`.
    """
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
