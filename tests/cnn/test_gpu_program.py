"""The program that checks GPUs, where there is none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.checks import overlap

REPOSITORY = Path(__file__).parents[2]


def run(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "tests.gpu", *arguments]
    return subprocess.run(
        command, env=os.environ | environment, cwd=REPOSITORY, capture_output=True, text=True, check=False
    )


@pytest.mark.long
def test_without_a_gpu_it_is_skipped_in_a_line() -> None:
    done = run(CUDA_VISIBLE_DEVICES="")
    assert (done.returncode, done.stdout.count("\n"), done.stdout[:8]) == (0, 1, "skipped:")


def test_what_is_missing_is_named() -> None:
    command = [sys.executable, "-S", "-m", "tests.gpu", "--cpu"]  # without the installed packages
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    missing = "torch torchvision numpy pillow pydantic safetensors"
    assert (done.returncode, done.stderr) == (2, f"missing: pip install {missing}\n")


def test_the_overlap_of_a_trace_is_the_share_of_nccl_time_beside_other_kernels() -> None:
    def kernel(name: str, begin: float, end: float) -> dict[str, object]:
        return {"cat": "kernel", "name": name, "ts": begin, "dur": end - begin}

    others = [kernel("gemm", 0, 12), kernel("relu", 5, 14), kernel("add", 18, 40), {"cat": "cpu_op", "name": "conv"}]
    assert overlap([*others, kernel("ncclDevKernel_SendRecv", 10, 20)]) == pytest.approx(0.6)
    assert overlap([kernel("ncclDevKernel_SendRecv", 10, 20)]) == overlap(others) == 0.0


@pytest.mark.slow
def test_the_checks_pass_on_cores() -> None:
    done = run("--cpu", "--networks", "notes", "resnet18")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("| equal") == 8
    assert "| an image that is not a number is named | lane " in done.stdout
    assert "| probabilities as on a CPU | never run" in done.stdout
    assert done.stdout.endswith("\n0 failed\n")
