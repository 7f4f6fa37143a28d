"""A rank of a training that torchrun starts: does what `job.json` in its folder says, and writes `found.json` there."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cnn.config.training import TrainConfig
from cnn.data import device_batches
from cnn.data.manifest import Manifest
from cnn.data.mapped_split import MappedSplit
from cnn.distributed.process_group import make_deterministic, process_group
from cnn.networks.weights import weights_sha256
from cnn.training.loop import fit
from cnn.training.reports import EpochReport, StepReport
from cnn.training.trainer import NonFinite, Trainer
from cnn.training.training_state import restore, take_state
from tasks.training.trace import Trace

STATE, FOUND, TRACE = "state.safetensors", "found.json", "trace.json.gz"


class Poisoned(nn.Module):
    """Normalises images; makes those with a given sum of pixels not a number."""

    def __init__(self, normalise: nn.Module, pixels: int) -> None:
        super().__init__()
        self._normalise, self._pixels = normalise, pixels

    def forward(self, images: Tensor) -> Tensor:
        poisoned = images.flatten(1).sum(1) == self._pixels
        return torch.where(poisoned.view(-1, 1, 1, 1), torch.nan, self._normalise(images))


class Keeper:
    """Stores the state at each milestone, and fails or pauses where the job says so."""

    def __init__(self, folder: Path, job: dict[str, Any], rank: int) -> None:
        self._folder, self._job, self._rank = folder, job, rank
        self._trace = Trace(job["traced_steps"], folder / TRACE) if job["traced_steps"] and rank == 0 else None

    def on_step(self, report: StepReport) -> None: ...

    def on_epoch(self, report: EpochReport) -> None: ...

    def after_step(self, trainer: Trainer, *, milestone: bool) -> None:
        if self._trace:
            self._trace.step_done()
        if self._rank == self._job["failing_rank"] and trainer.step == self._job["fails_at"]:
            (self._folder / "failed").write_text(str(time.time()))
            os._exit(1)
        if milestone and self._rank == 0:
            list(trainer.reports.until(trainer.step))  # a state has no figures in flight
            save_file(take_state(trainer), self._folder / "new")
            (self._folder / "new").replace(self._folder / STATE)
            time.sleep(self._job["pause"])


def main() -> None:
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    job = json.loads((folder / "job.json").read_text())
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    data = Path(job["data"])
    manifest = Manifest.from_bytes((data / "manifest.json").read_bytes())
    train, val = (
        MappedSplit([data / f"{shard.sha256}.safetensors" for shard in manifest.splits[name].shards])
        for name in ("train", "val")
    )
    if not job["resident"]:
        device_batches.RESIDENT_SHARE = 0.0
    make_deterministic()
    with process_group() as (device, exchange):
        trainer = Trainer(
            TrainConfig.model_validate(job["config"]),
            manifest=manifest,
            train_split=train,
            val_split=val,
            device=device,
            exchange=exchange,
            stop_requested=lambda: job["stops_at"] is not None and trainer.step >= job["stops_at"],
        )
        state = folder / STATE
        restore(trainer, load_file(state) if rank == 0 and state.exists() else None)
        pixels = train.slice(0, len(train))[0].flatten(1).sum(1)
        worst = int(pixels.argmax())
        if job["poisoned"]:
            trainer.normalise = Poisoned(trainer.normalise, int(pixels.max()))
        began = trainer.step
        try:
            finished = fit(trainer, Keeper(folder, job, rank))
            found = {"began": began, "finished": finished, "weights": weights_sha256(trainer.weights())}
        except NonFinite as error:
            samples = trainer._samples(error.step - 1)
            guilty = [lane for lane, images in enumerate(samples.tolist()) if worst in images]
            found = {
                "lanes": error.lanes,
                "guilty": guilty,
                "images": error.samples == samples[guilty].flatten().tolist(),
            }
    if rank == 0:
        (folder / FOUND).write_text(json.dumps(found | {"device": device.type}))


if __name__ == "__main__":
    main()
