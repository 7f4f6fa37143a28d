"""Runs trials until the time is over, and prints what failed; exits with status 1 if anything did."""

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
from pathlib import Path

from tests.faults.campaign.faults import FAULTS, MOMENTS, plan
from tests.faults.campaign.invariants import INVARIANTS
from tests.faults.campaign.trial import Home, Plan, Trial


def seeds(seed: int) -> Iterator[int]:
    """Yields the seeds of a campaign's trials."""
    draw = random.Random(seed)
    while True:
        yield draw.randrange(10**6)


def undisturbed(home: Home) -> str:
    """Trains without a fault; returns the MLflow run that all others are compared with."""
    trial = Trial(home, Plan(0, "", "", "", 0, 0, 0, 2))
    trial.start()
    assert trial.commands[0].wait().status == 0, trial.commands[0].text
    return trial.finished()


def try_once(home: Home, chosen: Plan, reference: str) -> dict[str, str]:
    """Runs a trial; returns what is wrong, by invariant."""
    print(f"{time.strftime('%H:%M:%S')}  --trial {chosen.seed}: {chosen.fault}, {chosen.moment}", flush=True)
    trial = Trial(home, chosen, reference)
    trial.start()
    trial.comes_to(MOMENTS[chosen.moment])
    if not trial.late:
        FAULTS[chosen.family][chosen.fault].act(trial)
    trial.recover()
    print(f"          {', '.join(map(str, trial.commands))}{' (it came too late)' if trial.late else ''}")
    wrong = {name: found for name, check in INVARIANTS.items() if (found := check(trial))}
    for name, found in wrong.items():
        print(f"          {name}: {found}", flush=True)
    return wrong


def print_table(rows: list[tuple[Plan, dict[str, str]]]) -> None:
    """Prints each trial with the invariants that failed, and how often each did."""
    print(f"\n{'trial':>7}  {'fault':28} {'moment':18} failed")
    for chosen, wrong in rows:
        print(f"{chosen.seed:7}  {chosen.fault:28} {chosen.moment:18} {', '.join(wrong) or '-'}")
    counts = Counter(name for _, wrong in rows for name in wrong)
    print(f"{len(rows)} trials; failed: {', '.join(f'{name} {n}' for name, n in counts.most_common()) or 'none'}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Random faults, and what must hold in spite of them.")
    parser.add_argument("--minutes", type=float, default=20, help="no trial starts after so many")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6), help="of all trials")
    parser.add_argument("--trial", type=int, nargs="*", help="only these trials, by their seeds")
    asked = parser.parse_args()
    for name in [name for name in os.environ if name.startswith(("AWS_", "CONVOY_", "MLFLOW_", "PREFECT_"))]:
        del os.environ[name]  # the user's own
    for sent in (signal.SIGINT, signal.SIGTERM):  # where they are ignored, as behind a shell's &, children ignore them
        signal.signal(sent, lambda *_: sys.exit("interrupted"))
    rows: list[tuple[Plan, dict[str, str]]] = []
    end = time.monotonic() + 60 * asked.minutes
    print(f"SEED={asked.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="convoy-faults-", ignore_cleanup_errors=True) as folder:
        home = Home(Path(folder))
        try:
            home.up()
            reference = undisturbed(home)
            for chosen in map(plan, asked.trial or seeds(asked.seed)):
                if time.monotonic() > end:
                    break
                if chosen.family == "disk" and not home.disks:
                    print(f"          --trial {chosen.seed} is left out: small disks take root")
                    continue
                try:
                    rows.append((chosen, try_once(home, chosen, reference)))
                except Exception as error:  # a server that cannot be asked, for example; the next trial may tell more
                    traceback.print_exc()
                    rows.append((chosen, {f"broke off with {type(error).__name__}": str(error)}))
                home.clean()
        finally:
            home.close()
            print_table(rows)
    return int(any(wrong for _, wrong in rows))


if __name__ == "__main__":
    sys.exit(main())
