"""Prints a table of checks; exits with status 1 if one failed. See the package's docstring."""

import argparse
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

NEEDED = {"torch": "torch", "torchvision": "torchvision", "numpy": "numpy", "PIL": "pillow"} | {
    name: name for name in ("pydantic", "safetensors")
}
"""What `cnn` imports, with the names of the packages."""

NETWORKS = (
    *("notes", "convoy9", "efficientnet_lite0", "convnext_tiny", "densenet121", "efficientnet_b0"),
    *("mnasnet1_0", "mobilenet_v3_small", "regnet_y_400mf", "resnet18", "resnext50_32x4d", "shufflenet_v2_x1_0"),
    *("squeezenet1_1", "swin_t", "vit_b_16", "wide_resnet50_2"),
)
"""One of each family, but those that have no deterministic backward pass on a GPU: AlexNet and VGG."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description="Checks the training on GPUs.")
    parser.add_argument("--cpu", action="store_true", help="on CPU cores, as a machine without GPUs can")
    parser.add_argument("--networks", nargs="*", default=NETWORKS, help="whose gradients are compared")
    asked = parser.parse_args()
    if missing := [package for module, package in NEEDED.items() if not find_spec(module)]:
        print(f"missing: pip install {' '.join(missing)}", file=sys.stderr)
        return 2
    import torch  # only now, as it may be missing

    if not asked.cpu and not torch.cuda.is_available():
        print("skipped: PyTorch sees no GPU; `--cpu` runs the same checks on CPU cores")
        return 0
    from tests.gpu import checks

    failed = 0
    cards = "CPU" if asked.cpu else ", ".join(map(torch.cuda.get_device_name, range(torch.cuda.device_count())))
    print(
        f"PyTorch {torch.__version__}, CUDA {torch.version.cuda}, {cards}\n\n| check | found |\n|---|---|", flush=True
    )

    def row(name: str, check: Callable[[], str]) -> str:
        nonlocal failed
        try:
            found = check()
        except Exception as error:
            found = f"failed: {type(error).__name__}: {error}".replace("\n", " ")[:300]
        failed += found.startswith("failed")
        print(f"| {name} | {found} |", flush=True)
        return found

    with tempfile.TemporaryDirectory(prefix="convoy-gpu-") as folder:
        machine = checks.Machine(Path(folder), cpu=asked.cpu)
        expected = row("weights of one rank", lambda: checks.reference(machine))
        for name, check in checks.equal_bits(machine, expected):
            row(f"weights: {name}", check)
        row("a rank that fails ends the others", lambda: checks.all_end(machine))
        row("an image that is not a number is named", lambda: checks.not_finite(machine))
        row("the exchange runs beside the backward pass", lambda: checks.overlapped(machine))
        row("probabilities as on a CPU", lambda: checks.as_on_a_cpu(machine))
        for network in asked.networks:
            row(f"gradient of {network}, twice", lambda network=network: checks.deterministic(machine, network))
    print(f"\n{failed} failed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
