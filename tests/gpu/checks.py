"""The checks of `python -m tests.gpu`. Each returns what it found; a failure begins with `failed`."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cnn.config.preprocessing import PreprocessConfig
from cnn.config.training import TrainConfig
from cnn.data.manifest import Manifest
from cnn.data.mapped_split import MappedSplit
from cnn.distributed.process_group import device_count, make_deterministic
from cnn.evaluation.evaluate import predict_logits
from cnn.networks.build import build_network
from cnn.networks.wrappers import Normalise
from cnn.preprocessing.pack import preprocess
from tests.gpu.rank import FOUND, STATE, TRACE

IMAGES, SIDE, GREY = 1797, 8, 16
CONFIG: dict[str, Any] = {
    **{"model": "convoy9", "network": {"width": 8, "dropout": 0.1}, "epochs": 4, "batch_size": 64, "lanes": 4},
    **{"augment": {"flip": False, "shift": 1, "cutout": 2, "mixup": 0.2}, "ema": 0.9},
}
STEPS_PER_EPOCH = 22  # at least; for faults in the middle of a training
ENDS_WITHIN = 30.0  # seconds that ranks may take to end after one has failed
LARGEST_DIFFERENCE = 1e-4  # of a probability, between the devices
NEVER = "never run"


@dataclass
class Machine:
    """Where the checks run."""

    folder: Path
    cpu: bool
    manifest: Manifest = field(init=False)

    def __post_init__(self) -> None:
        """Packs images in the format of scikit-learn's digits: a pattern per class, with noise."""
        random = torch.Generator().manual_seed(1)
        patterns = torch.randint(GREY + 1, (10, SIDE * SIDE), generator=random)
        labels = torch.arange(IMAGES) % 10
        noise = torch.randint(-6, 7, (IMAGES, SIDE * SIDE), generator=random)
        rows = torch.cat([(patterns[labels] + noise).clamp(0, GREY), labels[:, None]], 1)
        csv = self.folder / "digits.csv"
        csv.write_text("".join(",".join(map(str, row)) + "\n" for row in rows.tolist()))
        self.manifest = preprocess("digits", {"digits.csv": csv}, PreprocessConfig(), self.folder)
        (self.folder / "manifest.json").write_bytes(self.manifest.to_bytes())

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.cpu else "cuda")

    def can_run(self, ranks: int) -> bool:
        """Returns whether each rank can have a device; ranks share CPU cores."""
        return self.cpu or ranks <= device_count()

    def split(self, name: str) -> MappedSplit:
        shards = self.manifest.splits[name].shards
        return MappedSplit([self.folder / f"{shard.sha256}.safetensors" for shard in shards])


class Training:
    """A training in a folder of its own, which later starts of its ranks go on with."""

    def __init__(self, machine: Machine, name: str, **config: Any) -> None:
        self._machine, self._config = machine, CONFIG | config
        self.folder = machine.folder / name
        self.folder.mkdir()

    def start(self, ranks: int, **job: Any) -> "subprocess.Popen[bytes]":
        asked = {"stops_at": None, "failing_rank": None, "fails_at": None, "pause": 0.0} | job
        asked = {"poisoned": False, "resident": True, "traced_steps": 0} | asked
        asked |= {"data": str(self._machine.folder), "config": self._config}
        (self.folder / "job.json").write_text(json.dumps(asked))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        if self._machine.cpu:
            environment |= {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen(
                [*command, "-m", "tests.gpu.rank", str(self.folder)], env=environment, stdout=log, stderr=log
            )

    def train(self, ranks: int, **job: Any) -> dict[str, Any]:
        """Returns what rank 0 found.

        Raises:
            RuntimeError: the ranks failed.
        """
        if status := self.start(ranks, **job).wait():
            log = (self.folder / "log").read_text().splitlines()
            error = next((line for line in log if re.search(r"^(\[rank\d+\]: )?[\w.]+(Error|NonFinite)\b", line)), "")
            raise RuntimeError(f"status {status}: {error}")
        return dict(json.loads((self.folder / FOUND).read_text()))

    def wait_for(self, name: str, process: "subprocess.Popen[bytes]") -> Path:
        """Waits until the ranks have written a file."""
        while not (self.folder / name).exists():
            if process.poll() is not None:
                raise RuntimeError(f"the ranks ended before {name} was there")
            time.sleep(0.02)
        return self.folder / name


def reference(machine: Machine) -> str:
    """Returns the SHA-256 of the weights of one rank."""
    found = Training(machine, "one").train(1)
    if found["device"] != machine.device.type:
        raise RuntimeError(f"the rank ran on {found['device']}")
    return str(found["weights"])


def equal_bits(machine: Machine, expected: str) -> Iterator[tuple[str, Callable[[], str]]]:
    """Yields the checks whose weights must be those of one rank, with their names."""

    def weights(name: str, *parts: tuple[int, int | None]) -> str:
        if not all(machine.can_run(ranks) for ranks, _ in parts):
            return f"{NEVER}: {device_count()} GPU" + "s" * (device_count() > 1)
        training = Training(machine, name)
        for ranks, stops_at in parts:
            found = training.train(ranks, stops_at=stops_at)
        return _compared(found["weights"], expected)

    half = 2 * STEPS_PER_EPOCH
    yield "one rank again", lambda: weights("again", (1, None))
    yield "2 ranks", lambda: weights("two", (2, None))
    yield "4 ranks", lambda: weights("four", (4, None))
    yield "stopped half-way and resumed", lambda: weights("resumed", (1, half), (1, None))
    yield "stopped with 2 ranks, resumed with 1", lambda: weights("fewer", (2, half), (1, None))
    yield "killed (SIGKILL) and resumed", lambda: _killed(machine, expected)
    yield "images copied in each step", lambda: _copied(machine, expected)


def _killed(machine: Machine, expected: str) -> str:
    training = Training(machine, "killed")
    ranks = training.start(1, pause=2.0)
    training.wait_for(STATE, ranks)
    os.kill(int((training.folder / "pid-0").read_text()), signal.SIGKILL)
    if not ranks.wait():
        return "failed: it ended before it was killed"
    found = training.train(1)
    return _compared(found["weights"], expected) if found["began"] else "failed: it began anew"


def _copied(machine: Machine, expected: str) -> str:
    """Trains on images that are copied to the GPU ahead of use, as where they do not fit there."""
    if machine.cpu:
        return f"{NEVER}: images stay where they are"
    return _compared(Training(machine, "copied").train(1, resident=False)["weights"], expected)


def _compared(weights: str, expected: str) -> str:
    return f"equal: {weights[:12]}" if weights == expected else f"failed: {weights[:12]}, not {expected[:12]}"


def all_end(machine: Machine) -> str:
    """Has one of two ranks end in mid-training; returns how soon the other one has ended."""
    if not machine.can_run(2):
        return f"{NEVER}: {device_count()} GPU"
    training = Training(machine, "failing")
    ranks = training.start(2, failing_rank=1, fails_at=STEPS_PER_EPOCH)
    status = ranks.wait()
    seconds = time.time() - float((training.folder / "failed").read_text())
    return f"after {seconds:.1f} s" if status and seconds < ENDS_WITHIN else f"failed: after {seconds:.1f} s, {status}"


def not_finite(machine: Machine) -> str:
    """Makes one image not a number; returns which lane the training blames."""
    training = Training(machine, "poisoned", augment={"flip": False, "shift": 0})
    found = training.train(1, poisoned=True)
    right = found["lanes"] == found["guilty"] and found["images"]
    return f"lane {found['lanes'][0]}" if right else f"failed: {found}"


def overlapped(machine: Machine) -> str:
    """Traces some steps of two ranks; returns which share of the exchange other kernels of the GPU hide."""
    if machine.cpu or not machine.can_run(2):
        return f"{NEVER}: {0 if machine.cpu else device_count()} GPU"
    training = Training(machine, "traced", network={"width": 64})
    training.train(2, traced_steps=10)
    with gzip.open(training.folder / TRACE) as trace:
        share = overlap(json.load(trace)["traceEvents"])
    return f"{share:.0%} of the exchange" if share else "failed: nothing of the exchange"


def overlap(events: Sequence[Mapping[str, Any]]) -> float:
    """Returns the share of NCCL's kernels during which another kernel ran, of a trace in Chrome's format."""
    exchange, others = list[tuple[float, float]](), list[tuple[float, float]]()
    for event in events:
        if event.get("cat") == "kernel":
            kind = exchange if "nccl" in event["name"].lower() else others
            kind.append((event["ts"], event["ts"] + event["dur"]))
    hidden = 0.0
    for begin, end in exchange:
        reached = begin
        for first, last in sorted(others):  # which may overlap one another
            hidden += max(0.0, min(end, last) - max(reached, first))
            reached = max(reached, min(end, last))
    return hidden / sum(end - begin for begin, end in exchange) if exchange else 0.0


def deterministic(machine: Machine, name: str) -> str:
    """Computes the gradient of a network twice from the same images."""
    make_deterministic()
    side = 224 if name.startswith(("vit", "swin", "maxvit")) else 64
    images = torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(1)).to(machine.device)
    labels = torch.arange(4, device=machine.device)
    torch.manual_seed(1)
    config = TrainConfig.model_validate({"model": name})
    network = build_network(config, channels=3, image_size=side, classes=10).to(machine.device).train()

    def gradient() -> list[Tensor]:
        torch.manual_seed(2)  # of dropout
        network.zero_grad(set_to_none=True)
        F.cross_entropy(network(images), labels).backward()
        return [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]

    gradient()  # which also changes batch norm's averages, on which a gradient in training does not depend
    first, second = gradient(), gradient()
    return "equal" if all(map(torch.equal, first, second)) else "failed: the gradients differ"


def as_on_a_cpu(machine: Machine) -> str:
    """Evaluates a network on the GPU and on the CPU; returns the largest difference of a probability."""
    if machine.cpu:
        return f"{NEVER}: there is no other device to compare with"
    torch.manual_seed(1)
    trained = build_network(TrainConfig(), channels=1, image_size=SIDE, classes=10)
    network = torch.nn.Sequential(Normalise(machine.manifest.mean, machine.manifest.std), trained)
    split = machine.split("test")
    ours, theirs = (
        predict_logits(network.to(device), split, torch.device(device)).softmax(1) for device in ("cuda", "cpu")
    )
    difference = float((ours - theirs).abs().max())
    return f"{'equal' if difference <= LARGEST_DIFFERENCE else 'failed'}: differs by {difference:.1e}"
