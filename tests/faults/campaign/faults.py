"""What happens to a training, and when; each trial's choice among these is a function of its seed."""

import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from signal import SIGCONT, SIGINT, SIGKILL, SIGSTOP, SIGTERM

import psutil

from infra import promotion
from infra.stackfolder import NAMES, ServerName
from tests.faults.campaign.trial import DISKS, Plan, Trial, send
from tests.flows.program import RESUMABLE_STEPS


def _steps(trial: Trial) -> int:
    return trial.training.steps() if trial.training else 0


MOMENTS: dict[str, Callable[[Trial], object]] = {
    "at once": lambda trial: True,
    "about to train": lambda trial: trial.training,
    "ranks start": lambda trial: trial.training and trial.training.processes("tasks.rank"),
    "in training": lambda trial: _steps(trial) >= trial.plan.step,
    "last step": lambda trial: _steps(trial) >= RESUMABLE_STEPS,
    "weights committed": lambda trial: trial.training and (trial.training.folder / "outcome.json").exists(),
    "evaluated": lambda trial: any("test/accuracy" in run.data.metrics for run in trial.runs()),
    "registered": lambda trial: trial.versions(),
    "promoted": lambda trial: promotion.history(trial.home.store(), trial.name),
}
ALL = tuple(MOMENTS)
RANKS_LIVE = ("ranks start", "in training", "last step")
TRAINING = ("about to train", *RANKS_LIVE)
CHECKPOINTED = ("in training", "last step", "weights committed")


@dataclass(frozen=True, slots=True)
class Fault:
    """What is done, and at which moments it can be done."""

    act: Callable[[Trial], None]
    moments: tuple[str, ...]


def _signal(sent: signal.Signals, victim: str, trial: Trial) -> None:
    if victim in ("flow", "worker"):
        command = trial.commands[0] if victim == "flow" else trial.worker
        found = [psutil.Process(command.process.pid)] if command.status is None else []
    else:
        module = {"supervisor": "tasks.supervisor", "torchrun": "tasks.torchrun"}.get(victim, "tasks.rank")
        found = trial.training.processes(module) if trial.training else []
        found = [each for each in found if not victim.startswith("rank") or each.environ()["RANK"] == victim[-1]]
    trial.late = not found
    send(sent, found)


def _worker_and_all_below(trial: Trial) -> None:
    worker = psutil.Process(trial.worker.process.pid)
    send(SIGKILL, [worker, *worker.children(recursive=True)])


def _server(name: ServerName, how: str, trial: Trial) -> None:
    processes = trial.home.servers(name)
    send(SIGSTOP if how == "hangs" else SIGKILL, processes)
    if how != "killed":
        time.sleep(trial.plan.seconds)
    if how == "hangs":
        send(SIGCONT, processes)
    elif how == "away":
        trial.home.up()


def _down_and_up(trial: Trial) -> None:
    trial.home.run("down")
    trial.home.up()


def _power_cut(trial: Trial) -> None:
    send(SIGKILL, [*trial.home.servers(*NAMES), *trial.home.others()])


def _damaged(how: str, content: bytes, trial: Trial) -> bytes:
    """One bit is flipped in the latter half, or that half is missing."""
    draw = random.Random(trial.plan.seed)
    at = draw.randrange(len(content) // 2, len(content))
    return content[:at] + (bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]) * (how == "flipped")


def _cache(how: str, victim: str, trial: Trial) -> None:
    """Damages what is in the cache, and has it read again: by a resume, or by a rank that is started again."""
    for path in (trial.home.folder / "cache").rglob("*"):
        if path.is_file() and len(path.name) == 64:  # named by its SHA-256
            content = path.read_bytes()
            path.unlink()
            if how != "deleted":
                path.write_bytes(_damaged(how, content, trial))
    _signal(SIGKILL, victim, trial)


def _checkpoint(how: str, trial: Trial) -> None:
    """Damages the newest checkpoint in the bucket, once the flow is killed."""
    _signal(SIGKILL, "flow", trial)
    trial.commands[0].wait()
    store, run = trial.home.store(), trial.training.run_id if trial.training else ""
    keys = [info.key for info in store.list(f"runs/{run}/checkpoints/") if info.key.endswith(".safetensors")]
    for key in sorted(keys)[-1:]:
        content = store.get_bytes(key)
        store.delete(key)
        if how != "deleted":
            store.put_bytes(key, _damaged(how, content, trial))


def _disk_full(folder: str, trial: Trial) -> None:
    filler = trial.home.folder / folder / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            with suppress(OSError):
                while file.write(bytes(size)) == size:
                    pass
    time.sleep(trial.plan.seconds)
    filler.unlink()


def _resumed(times: int, trial: Trial) -> None:
    """Resumes so many times at once; a single one does so while the training runs."""
    if times > 1:
        _signal(SIGKILL, "flow", trial)
        trial.commands[0].wait()
    for _ in range(times if trial.runs() else 0):
        trial.resume()


def _beside(command: tuple[str, ...], trial: Trial) -> None:
    commands = [trial.home.start(*command) for _ in range(2)]
    trial.noticed += [str(each) for each in commands if each.wait().status]


FAULTS: dict[str, dict[str, Fault]] = {
    "signal": {
        f"{sent.name} {victim}": Fault(partial(_signal, sent, victim), ALL if victim == "flow" else RANKS_LIVE)
        for victim in ("flow", "supervisor", "torchrun", "rank 0", "rank 1")
        for sent in ((SIGTERM, SIGINT, SIGKILL) if victim == "flow" else (SIGTERM, SIGKILL))
    },
    "server": {
        f"{name} {how}": Fault(partial(_server, name, how), ALL)
        for name in NAMES
        for how in ("killed", "hangs", "away")
    },
    "power": {"power cut": Fault(_power_cut, ALL), "down and up": Fault(_down_and_up, ALL)},
    "cache": {
        f"cache {how}, {victim} killed": Fault(partial(_cache, how, victim), RANKS_LIVE)
        for how in ("flipped", "truncated", "deleted")
        for victim in ("flow", "rank 0")
    },
    "checkpoint": {
        f"checkpoint {how}": Fault(partial(_checkpoint, how), CHECKPOINTED)
        for how in ("flipped", "truncated", "deleted")
    },
    "disk": {f"disk of {folder or 'home'} full": Fault(partial(_disk_full, folder), ALL) for folder in DISKS},
    "race": {
        "resumed while it runs": Fault(partial(_resumed, 1), TRAINING),
        "resumed twice": Fault(partial(_resumed, 2), TRAINING),
        "two prunes": Fault(partial(_beside, ("prune",)), ALL),
        "two doctors": Fault(partial(_beside, ("doctor", "--fix")), ALL),
    },
    "worker": {
        "SIGTERM worker": Fault(partial(_signal, SIGTERM, "worker"), TRAINING),
        "SIGKILL worker": Fault(partial(_signal, SIGKILL, "worker"), TRAINING),
        "SIGKILL worker and all below": Fault(_worker_and_all_below, TRAINING),
    },
}


def plan(seed: int) -> Plan:
    """Returns the plan of a trial: first a family, so that each kind comes equally often."""
    draw = random.Random(seed)
    family = draw.choice(list(FAULTS))
    name = draw.choice(list(FAULTS[family]))
    moment = draw.choice(FAULTS[family][name].moments)
    step, delay = draw.randint(1, RESUMABLE_STEPS - 30), draw.uniform(0, 12 if moment == "at once" else 1)
    return Plan(seed, family, name, moment, step, delay, draw.choice((3.0, 20.0, 65.0)), draw.choice((1, 2, 4)))
