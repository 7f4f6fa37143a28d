"""Lists when something happens to a training, what, and what must hold afterwards; a seed chooses among these."""

import random
from collections.abc import Callable
from functools import partial
from signal import SIGINT, SIGKILL, SIGTERM

from infra.stack.state import SERVER_NAMES
from infra.tracking import promotion_history
from tests.faults.campaign import acts, invariants
from tests.faults.campaign.trial import DISKS, STEPS, Plan, Trial

MOMENTS: dict[str, Callable[[Trial], object]] = {
    "at once": lambda trial: True,
    "about to train": lambda trial: trial.training,
    "ranks start": lambda trial: trial.training and trial.training.processes("tasks.training.rank"),
    "in training": lambda trial: trial.steps() >= trial.plan.step,
    "last step": lambda trial: trial.steps() >= STEPS,
    "weights committed": lambda trial: trial.training and (trial.training.folder / "outcome.json").exists(),
    "evaluated": lambda trial: any("test/accuracy" in run.data.metrics for run in trial.runs()),
    "registered": lambda trial: trial.versions(),
    "promoted": lambda trial: promotion_history.history(trial.home.store(), trial.name),
}
ALL = tuple(MOMENTS)
RANKS_LIVE = ("ranks start", "in training", "last step")
TRAINING = ("about to train", *RANKS_LIVE)
FLOW_RUNS = tuple(moment for moment in ALL if moment != "at once")
CHECKPOINTED = ("in training", "last step", "weights committed")


Act = Callable[[Trial], None]

FAULTS: dict[str, dict[str, tuple[Act, tuple[str, ...]]]] = {  # what is done, and when it can be
    "signal": {
        f"{sent.name} {victim}": (partial(acts.signal, sent, victim), ALL if victim == "flow" else RANKS_LIVE)
        for victim in ("flow", "supervisor", "torchrun", "rank 0", "rank 1")
        for sent in ((SIGTERM, SIGINT, SIGKILL) if victim == "flow" else (SIGTERM, SIGKILL))
    },
    "server": {
        f"{name} {how}": (partial(acts.server, name, how), ALL)
        for name in SERVER_NAMES
        for how in ("killed", "hangs", "away")
    },
    "power": {"power cut": (acts.power_cut, ALL), "down and up": (acts.down_and_up, ALL)},
    "cache": {
        f"cache {how}, {victim} killed": (partial(acts.cache, how, victim), RANKS_LIVE)
        for how in ("flipped", "truncated", "deleted")
        for victim in ("flow", "rank 0")
    },
    "checkpoint": {
        f"checkpoint {how}": (partial(acts.checkpoint, how), CHECKPOINTED)
        for how in ("flipped", "truncated", "deleted")
    },
    "disk": {f"disk of {folder or 'home'} full": (partial(acts.disk_full, folder), ALL) for folder in DISKS},
    "race": {
        "resumed while it runs": (partial(acts.resumed, 1), TRAINING),
        "resumed twice": (partial(acts.resumed, 2), TRAINING),
        "two prunes": (partial(acts.beside, ("prune",)), ALL),
        "two doctors": (partial(acts.beside, ("doctor", "--fix")), ALL),
    },
    "worker": {
        f"{sent.name} {victim}": (partial(acts.signal, sent, victim), TRAINING)
        for sent, victim in ((SIGTERM, "worker"), (SIGKILL, "worker"), (SIGKILL, "worker and all below"))
    },
    "night": {  # in which nobody types anything, see `night.watch`
        **{
            f"{sent.name} {victim}": (partial(acts.signal, sent, victim), RANKS_LIVE)
            for sent, victim in (
                *((SIGTERM, "worker"), (SIGKILL, "worker"), (SIGKILL, "worker and all below")),
                *((SIGKILL, "supervisor"), (SIGKILL, "torchrun"), (SIGKILL, "rank 0"), (SIGTERM, "rank 0")),
            )
        },
        **{
            f"{sent.name} flow of the worker": (partial(acts.flow_of_worker, sent), FLOW_RUNS)
            for sent in (SIGTERM, SIGKILL)
        },
        **{f"{name} killed": (partial(acts.server, name, "killed"), FLOW_RUNS) for name in SERVER_NAMES},
        "everything at once": (acts.power_cut, FLOW_RUNS),
    },
    "away": {  # likewise; each step after the training meets an outage of each server
        f"{name} away, {moment}": (partial(acts.server, name, "away"), (moment,))
        for name in SERVER_NAMES
        for moment in ("weights committed", "evaluated", "registered", "promoted")
    },
}

INVARIANTS: dict[str, Callable[[Trial], list[str]]] = {
    check.__name__: check
    for check in (
        *(invariants.weights, invariants.metrics, invariants.versions, invariants.champion),
        *(invariants.processes, invariants.open_runs, invariants.leftovers, invariants.messages),
    )
}


def plan(seed: int) -> Plan:
    """Returns the plan of a trial: first a family, so that each kind comes equally often."""
    draw = random.Random(seed)
    family = draw.choice(list(FAULTS))
    name = draw.choice(list(FAULTS[family]))
    moment = draw.choice(FAULTS[family][name][1])
    step, delay = draw.randint(1, STEPS - 30), draw.uniform(0, 12 if moment == "at once" else 1)
    seconds = 65.0 if family == "away" else draw.choice((3.0, 20.0, 65.0))
    return Plan(seed, family, name, moment, step, delay, seconds, draw.choice((1, 2, 4)))
