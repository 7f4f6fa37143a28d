"""What checkpoints cost a training."""

import sys
import uuid
from collections.abc import Iterator

from cnn.distributed.process_group import make_deterministic, process_group
from cnn.training.trainer import Trainer
from cnn.training.training_state import take_state
from infra.storage.object_store import ObjectStore
from tasks.config.run import CheckpointConfig
from tasks.training.checkpoints import CheckpointWriter, Snapshot
from tasks.training.protocol.job import Job
from tests.bench.comparison import Comparison, Side, compare, keep_memory, rate
from tests.bench.data import open_packed, packed_images
from tests.bench.rank_program import train_step
from tests.bench.servers import object_store
from tests.bench.turns import Job as Training

EVERY = 3.0  # seconds; a tenth of the default, so that rounds can be short
STEPS = 40  # a round; some eight seconds on one core


def checkpoints(rounds: int) -> Iterator[Comparison]:
    """A training that stores checkpoints every three seconds (default: thirty) against the same without any.

    One rank of one thread, with momentum and a moving average in the state; a real object store on this machine, whose
    work is paid for too where the machine has no core to spare.
    """
    make_deterministic()
    keep_memory()
    config = Training(program="convoy").config.model_copy(update={"ema": 0.99})
    with object_store() as settings, packed_images() as folder, process_group() as (device, exchange):
        manifest, train = open_packed(folder)
        trainer = Trainer(
            config, manifest=manifest, train_split=train, val_split=train, device=device, exchange=exchange
        )
        job = Job(
            run_id=uuid.uuid4().hex,
            config=config,
            dataset_version=manifest.version,
            world_size=1,
            manifest_digest="",
            checkpoints=CheckpointConfig(every=EVERY),
            restarts=0,
        )
        store = ObjectStore.connect(settings.bucket)
        writer = CheckpointWriter(
            store, job, settings.home, job.checkpoints, on_trouble=lambda trouble: print(trouble, file=sys.stderr)
        )

        def step() -> float:
            train_step(trainer)
            return config.batch_size

        def step_and_store() -> float:
            train_step(trainer)
            if writer.is_due():
                list(trainer.reports.until(trainer.step))
                writer.save(
                    Snapshot(
                        step=trainer.step,
                        state=take_state(trainer),
                        val_accuracy=None,
                        train_seconds=0,
                        rank_seconds=0,
                        metrics=(),
                    )
                )
            return config.batch_size

        ours, theirs = (rate(each, calls=STEPS) for each in (step_and_store, step))
        yield compare(f"checkpoints: every {EVERY:.0f} s", Side("with", ours), Side("without", theirs), rounds=rounds)
        writer.close(60)
