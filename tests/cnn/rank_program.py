"""Trains on packed digits at several world sizes, as each line of standard input asks: [FOLDER, CONFIG, READER, PLANS].

A plan is a world size (`2`), or several, each with the step about which to stop and go on with the next: `2@9,4@30,1`.
Answers with one JSON line: for each plan the list of what its last ranks found (digests of the weights, and every
report of all parts); or null if a rank failed. Ranks are forked from this process, so that torch is loaded once for all
tests. With READER `streamed`, shards come one by one, and few are here at a time.
"""

import json
import multiprocessing
import os
import sys
import tempfile
import traceback
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch._dynamo  # noqa: F401  # DDP loads it: here once, rather than in each rank
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from cnn.config.networks import find_network, is_own
from cnn.config.training import TrainConfig
from cnn.data.manifest import Manifest
from cnn.distributed.process_group import make_deterministic, process_group
from cnn.networks.weights import weights_sha256
from cnn.training.loop import fit
from cnn.training.reports import EpochReport, StepReport
from cnn.training.trainer import Trainer
from cnn.training.training_state import restore, take_state
from tests.cnn.conftest import Packed, streamed


class History:
    """Keeps all reports, and the state at the last milestone."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.epochs: list[dict[str, Any]] = []
        self.state: dict[str, Any] = {}

    def on_step(self, report: StepReport) -> None:
        self.steps.append({key: value for key, value in asdict(report).items() if not key.endswith("_seconds")})

    def on_epoch(self, report: EpochReport) -> None:
        self.epochs.append(asdict(report))

    def after_step(self, trainer: Trainer, *, milestone: bool) -> None:
        if milestone:
            for report in trainer.reports.until(trainer.step):
                self.on_step(report)
            self.state = take_state(trainer)


def run_rank(
    folder: Path, config: TrainConfig, reader: str, meeting: Path, rank: int, world_size: int, stop: int | None
) -> dict[str, Any]:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    manifest = Manifest.from_bytes((folder / "manifest.json").read_bytes())
    packed = Packed(folder, manifest)
    if reader == "streamed":
        train, val = (streamed(packed, split, meeting / f"shards-{rank}-{split}") for split in ("train", "val"))
    else:
        train, val = packed.split("train"), packed.split("val")
    make_deterministic()
    state = meeting / "state.safetensors"
    with process_group(dist.FileStore(str(meeting / f"ranks-{stop}"), world_size)) as (device, exchange):
        trainer = Trainer(
            config,
            manifest=manifest,
            train_split=train,
            val_split=val,
            device=device,
            exchange=exchange,
            # One rank's wish is enough, and it is the last one's.
            stop_requested=lambda: rank == world_size - 1 and stop is not None and trainer.step >= stop,
        )
        restore(trainer, load_file(state) if rank == 0 and state.exists() else None)
        history = History()
        finished = fit(trainer, history)
        if rank == 0:
            save_file(history.state, state)
    assert finished == (stop is None)
    return {
        "weights": weights_sha256(trainer.weights()),
        "state": weights_sha256(history.state),
        "steps": history.steps,
        "epochs": history.epochs,
    }


def run_or_end(arguments: tuple[Any, ...]) -> dict[str, Any]:
    """Runs a rank; a failed rank ends its process, and with it the pool, since the other ranks would wait for it."""
    try:
        return run_rank(*arguments)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def run_plan(folder: Path, config: TrainConfig, reader: str, plan: str) -> list[dict[str, Any]]:
    """Returns what the last part's ranks found."""
    said: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as meeting:
        earlier: dict[str, list[Any]] = {"steps": [], "epochs": []}
        for part in plan.split(","):
            size, _, at = part.partition("@")
            stop = int(at) if at else None
            ranks = [(folder, config, reader, Path(meeting), rank, int(size), stop) for rank in range(int(size))]
            with ProcessPoolExecutor(int(size), multiprocessing.get_context("fork")) as pool:
                said = list(pool.map(run_or_end, ranks))
            for each in said:
                each |= {key: earlier[key] + each[key] for key in earlier}
            # The first rank alone reads the figures of the last steps before a stop.
            earlier = {key: said[0][key] for key in earlier}
    return said


def main() -> None:
    for line in sys.stdin:
        folder, values, reader, plans = json.loads(line)
        config = TrainConfig.model_validate(values)
        if not is_own(config.model):
            resolve_name(find_network(config.model).builder)  # the library: here once, rather than in each rank
        try:
            found = [run_plan(Path(folder), config, reader, plan) for plan in plans]
        except BrokenProcessPool:  # the rank has said why
            found = None
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
