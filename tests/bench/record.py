"""Recipe `fashion-94`, and the same without each of its parts, on Fashion-MNIST.

python -m tests.bench.record VERSION CONFIG    trains in one process of one thread, and prints its figures as JSON
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import fmean, stdev
from typing import Any
from unittest.mock import patch

from torch import nn

from cnn.config.training import TrainConfig
from cnn.distributed.process_group import device_count, make_deterministic, process_group
from cnn.evaluation.evaluate import evaluate
from cnn.networks.wrappers import predictor
from cnn.training.loop import fit
from cnn.training.trainer import Trainer
from infra.machine.lifeline import die_with_parent
from infra.settings import Settings
from infra.stack.local_stack import running
from infra.storage.object_store import open_bucket
from tasks.config.run import load_config
from tasks.data.dataset import load_manifest, open_cache, open_split
from tasks.data.download import download
from tasks.data.preprocess import preprocess
from tests.bench.comparison import Comparison, Quiet
from tests.bench.servers import convoy_servers

RECIPE = "fashion-94"
WITHOUT: Mapping[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd", "lr": 0.2, "weight_decay": 5e-4, "batch_size": 256},
    "weight_decay=0.0005": {"weight_decay": 5e-4},
    "shift=2": {"augment": {"shift": 2}},
    "usual first layer": {"network": {"stem_width": 32, "stem_kernel": 3}},
    "float32": {"precision": "float32"},
    "validate_every=1": {"validate_every": 1},
}
"""What replaces each part of the recipe."""

ABLATED = 2  # seeds for which the parts are left out


def record(rounds: int) -> Iterator[Comparison]:
    """Recipe `fashion-94`: wrong of 10 000 test images; for two seeds, the same without each part. Rounds are seeds.

    As many trainings run at a time as there are cores, each in one process of one thread: the number of ranks changes
    no weight.
    """
    with convoy_servers() as (_, environment), patch.dict(os.environ, environment, clear=True):
        yield from _measured(rounds)


def _measured(rounds: int) -> Iterator[Comparison]:
    running(Settings()).apply()
    config = load_config(None, recipe=RECIPE)
    version = preprocess.fn(download.fn(config.dataset), config.data).version
    seeds, ablated = range(rounds), range(min(rounds, ABLATED))
    whole = _trained(version, [{"seed": seed} for seed in seeds])
    if rounds > 1:
        right = [100 - figures["wrong"] / 100 for figures in whole]
        print(f"record: {fmean(right):.3f} %, standard deviation {stdev(right):.3f}", file=sys.stderr)
    for name, without in WITHOUT.items():
        parts = _trained(version, [{**without, "seed": seed} for seed in ablated])
        for figure, unit in (("wrong", "images"), ("seconds", "s")):
            ours, theirs = (tuple(each[figure] for each in side[: len(ablated)]) for side in (whole, parts))
            yield Comparison(
                name=f"record: {figure}", ours_label=RECIPE, theirs_label=name, unit=unit, ours=ours, theirs=theirs
            )


def _trained(version: str, changes: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Trains the recipe with each of these changes; returns the figures."""
    configs = [load_config(None, (), change, recipe=RECIPE).training() for change in changes]
    pool = ThreadPoolExecutor(device_count())
    try:
        return list(pool.map(lambda config: _train(version, config), configs))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # a stop of the benchmark ends the trainings


def _train(version: str, config: TrainConfig) -> dict[str, float]:
    program = [sys.executable, "-m", "tests.bench.record", version, config.model_dump_json()]
    done = subprocess.run(program, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True)
    figures: dict[str, float] = json.loads(done.stdout)
    print(f"seed {config.seed}: {figures}", file=sys.stderr)
    return figures


def main() -> None:
    """Trains, and prints how many test images are classified wrongly, and the seconds of the training."""
    die_with_parent(os.getppid())
    config = TrainConfig.model_validate_json(sys.argv[2])
    running(Settings()).apply()
    store = open_bucket()
    manifest, cache = load_manifest(store, sys.argv[1]), open_cache(store)
    train, val, test = (open_split(cache, manifest, split) for split in ("train", "val", "test"))
    make_deterministic()
    with process_group() as (device, exchange):
        trainer = Trainer(config, manifest=manifest, train_split=train, val_split=val, device=device, exchange=exchange)
        began = time.perf_counter()
        fit(trainer, Quiet())
        seconds = time.perf_counter() - began
        trainer.network.load_state_dict(trainer.weights())
        whole = nn.Sequential(trainer.normalise, predictor(trainer.network, config))
        wrong = round(len(test) * (1 - evaluate(whole, test, device, exchange).accuracy))
    print(json.dumps({"wrong": wrong, "seconds": seconds}))


if __name__ == "__main__":
    main()
