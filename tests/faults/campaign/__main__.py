"""Prints a table of trials, each row as the trial goes on; exits with status 1 if anything failed."""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from itertools import chain, repeat
from pathlib import Path

from tests.faults.campaign.night import watch
from tests.faults.campaign.tables import FAULTS, INVARIANTS, MOMENTS, plan
from tests.faults.campaign.trial import UNATTENDED, Home, Plan, Trial

HEAD = "| trial | seed | fault | moment | what the user did | failed |\n|---|---|---|---|---|---|"
UNDISTURBED = Plan(0, "", "none", "-", 0, 0, 0, 2)  # the first trial, with which all others are compared


def seeds(seed: int) -> Iterator[int]:
    """Returns the seeds of a campaign's trials, without end."""
    return map(random.Random(seed).randrange, repeat(10**6))


def each_of(family: str, seed: int) -> Iterator[Plan]:
    """Returns a plan for each fault of a family, at a moment by the seed."""
    left = set(FAULTS[family])
    for chosen in map(plan, seeds(seed)):
        if chosen.family == family and chosen.fault in left:
            left.remove(chosen.fault)
            yield chosen
        if not left:
            return


def run(trial: Trial) -> dict[str, list[str]]:
    """Runs a trial; returns what is wrong, by invariant."""
    chosen = trial.plan
    try:
        trial.start()
        if chosen is not UNDISTURBED:
            trial.comes_to(MOMENTS[chosen.moment])
            if not trial.late:
                FAULTS[chosen.family][chosen.fault][0](trial)
        if chosen.family in UNATTENDED:
            watch(trial)
        else:
            trial.recover()
        trial.home.reference = trial.home.reference or trial.finished()
        return {name: found for name, check in INVARIANTS.items() if (found := check(trial))}
    except Exception as error:  # a server that cannot be asked, for example; the next trial may tell more
        traceback.print_exc()
        return {"broke off": [f"{type(error).__name__}: {error}"[:200]]}


def main() -> int:
    parser = argparse.ArgumentParser(description="Random faults, and what must hold in spite of them.")
    parser.add_argument("--minutes", type=float, default=20, help="no trial starts after so many")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6), help="of all trials")
    parser.add_argument("--trial", type=int, nargs="*", help="only these trials, by their seeds")
    parser.add_argument("--family", choices=FAULTS, help="only faults of this family, each once")
    asked = parser.parse_args()
    for name in [name for name in os.environ if name.startswith(("AWS_", "CONVOY_", "MLFLOW_", "PREFECT_"))]:
        del os.environ[name]  # the user's own
    for sent in (signal.SIGINT, signal.SIGTERM):  # where they are ignored, as behind a shell's &, children ignore them
        signal.signal(sent, lambda *_: sys.exit("interrupted"))
    failed, done, end = Counter[str](), 0, time.monotonic() + 60 * asked.minutes
    print(f"SEED={asked.seed}\n\n{HEAD}", flush=True)
    with tempfile.TemporaryDirectory(prefix="convoy-faults-", ignore_cleanup_errors=True) as folder:
        home = Home(Path(folder))
        try:
            home.up()
            plans = each_of(asked.family, asked.seed) if asked.family else map(plan, asked.trial or seeds(asked.seed))
            for chosen in chain([UNDISTURBED], plans):
                if time.monotonic() > end:
                    break
                if chosen.family == "disk" and not home.disks:  # small disks take root
                    continue
                print(f"| {done} | {chosen.seed} | {chosen.fault} | {chosen.moment} |", end=" ", flush=True)
                trial = Trial(home, chosen)
                wrong = run(trial)
                home.clean()
                said = "; ".join(f"{len(found)} {name}: {', '.join(found[:3])}" for name, found in wrong.items())
                called = ", ".join(map(str, trial.commands)) + " (the fault came too late)" * trial.late
                print(f"{called} | {said or '-'} |", flush=True)
                failed.update(wrong.keys())
                done += 1
        finally:
            home.close()
            print(f"\n{done} trials; failed: {', '.join(f'{n} {name}' for name, n in failed.most_common()) or 'none'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
