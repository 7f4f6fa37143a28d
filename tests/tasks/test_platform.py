"""The code that a training's record covers, since it decides the weights."""

import subprocess
import sys
from pathlib import Path

import pytest

import cnn
from tasks.training.platform import weight_files

PACKAGE = Path(cnn.__path__[0])


@pytest.mark.long
def test_all_that_a_rank_loads_of_cnn_decides_weights() -> None:
    files = "(module.__file__ for name, module in sys.modules.items() if name.startswith('cnn.'))"
    code = f"import sys, tasks.training.rank; print(*{files})"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    loaded = {Path(file) for file in done.stdout.split()}
    assert PACKAGE / "training" / "trainer.py" in loaded
    assert loaded <= set(weight_files())


def test_what_exports_reads_checks_and_explains_decides_no_weights() -> None:
    counted = {file.relative_to(PACKAGE).as_posix() for file in weight_files()}
    left_out = {
        "serving/export.py",
        "formats/folder.py",
        "preprocessing/pack.py",
        "data/checks.py",
        "evaluation/grad_cam.py",
        "evaluation/label_errors.py",
    }
    assert all((PACKAGE / file).is_file() for file in left_out)
    assert not counted & left_out
