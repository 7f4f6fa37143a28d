"""Train on packed digits at several world sizes: rank_program.py FOLDER CONFIG WORLD_SIZE...

Prints one JSON line: for each world size the list of what its ranks found (the weights' digest and every report).
Ranks are forked from this process, so that torch is loaded once.
"""

import json
import multiprocessing
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist

from cnn.config import TrainConfig
from cnn.distributed import make_deterministic, process_group
from cnn.manifest import Manifest
from cnn.packed import PackedSplit
from cnn.trainer import EpochReport, StepReport, Trainer, fit
from cnn.weights import weights_sha256


class History:
    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.epochs: list[dict[str, object]] = []

    def on_step(self, report: StepReport) -> None:
        self.steps.append(asdict(report))

    def on_epoch(self, report: EpochReport) -> None:
        self.epochs.append(asdict(report))


def run_rank(folder: Path, config: TrainConfig, meeting: Path, rank: int, world_size: int) -> dict[str, object]:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    manifest = Manifest.from_bytes((folder / "manifest.json").read_bytes())
    train, val = (
        PackedSplit([folder / f"{shard.sha256}.safetensors" for shard in manifest.splits[split].shards])
        for split in ("train", "val")
    )
    make_deterministic()
    with process_group(dist.FileStore(str(meeting), world_size)) as (device, exchange):
        trainer = Trainer(config, manifest=manifest, train=train, val=val, device=device, exchange=exchange)
        history = History()
        fit(trainer, history)
    return {"weights": weights_sha256(trainer.network.state_dict()), **vars(history)}


def main() -> None:
    folder, config = Path(sys.argv[1]), TrainConfig.model_validate_json(sys.argv[2])
    found = []
    for world_size in map(int, sys.argv[3:]):
        with tempfile.TemporaryDirectory() as meeting:
            ranks = [(folder, config, Path(meeting, "ranks"), rank, world_size) for rank in range(world_size)]
            with multiprocessing.get_context("fork").Pool(world_size) as pool:
                found.append(pool.starmap(run_rank, ranks, chunksize=1))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
