"""Uses exported files as their users do: reads their metadata, and runs examples where Convoy cannot be imported."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import safe_open

START = """
import sys
from importlib.util import find_spec
sys.path.append(sys.argv[1])
assert not any(map(find_spec, ("cnn", "infra", "tasks", "flows")))
"""
END = """
np.savez("results.npz", images=images, calibrated=calibrated)
"""


KEYS = ("model", "version", "run", "weights_sha256", "classes", "input", "temperature", "probabilities", "example")


def read_metadata(file: Path) -> dict[str, str]:
    """Returns the metadata of an exported file; skips the test if ONNX Runtime is missing."""
    if file.suffix == ".pt2":
        found = dict.fromkeys(KEYS, "")
        torch.export.load(file, extra_files=found)
        return found
    if file.suffix == ".onnx":
        runtime = pytest.importorskip("onnxruntime")
        return dict(runtime.InferenceSession(str(file)).get_modelmeta().custom_metadata_map)
    with safe_open(file, framework="pt") as opened:
        return dict(opened.metadata())


def save_photo(folder: Path, size: tuple[int, int] = (205, 150), orientation: int = 6) -> bytes:
    """Writes `photo.jpg`, a colour photograph, by default of odd sides and lying on its side; returns its bytes."""
    colours = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[274] = orientation
    file = folder / "photo.jpg"
    Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC).save(file, exif=exif)
    return file.read_bytes()


def run_example(code: str, folder: Path) -> tuple[NDArray[np.uint8], NDArray[np.float32], str]:
    """Runs an example in a folder with its files; returns its `images`, calibrated probabilities, and last line.

    The process has Convoy's libraries. It reads no `.pth` file, by which an editable installation makes Convoy
    importable, and is told of no MLflow server.
    """
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", START + code + END, sysconfig.get_path("purelib")],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    with np.load(folder / "results.npz") as results:
        return results["images"], results["calibrated"], done.stdout.splitlines()[-1]
