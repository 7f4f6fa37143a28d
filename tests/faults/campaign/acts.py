"""Does to a training, its stack and its files what the table of faults lists."""

import random
import time
from contextlib import suppress
from signal import SIGCONT, SIGKILL, SIGSTOP, Signals

import psutil

from infra.stack.state import SERVER_NAMES, ServerName
from tests.faults.campaign.trial import Trial

MODULES = {
    "supervisor": "tasks.training.supervisor",
    "torchrun": "tasks.training.torchrun",
    "rank": "tasks.training.rank",
}


def signal(sent: Signals, victim: str, trial: Trial) -> None:
    """Sends a signal to the flow, its worker or a process of the training; too late if there is none."""
    name, _, which = victim.partition(" ")
    if name in MODULES:
        found = trial.training.processes(MODULES[name]) if trial.training else []
        found = [each for each in found if not which or each.name() == f"rank-{which}"]
    else:
        command = trial.commands[0] if name == "flow" else trial.worker
        found = [psutil.Process(command.pid)] if command.poll() is None else []
        found += [each for parent in found for each in parent.children(recursive=True)] if which else []
    trial.late = not found
    trial.send(sent, found)


def flow_of_worker(sent: Signals, trial: Trial) -> None:
    """Sends a signal to the flow run that the worker has started; too late if there is none."""
    found = [each for each in trial.home.others() if "prefect.engine" in " ".join(each.cmdline())]
    trial.late = not found
    trial.send(sent, found)


def server(name: ServerName, how: str, trial: Trial) -> None:
    """Kills a server for good or for some seconds, or stops it for these."""
    processes = trial.home.servers(name)
    trial.send(SIGSTOP if how == "hangs" else SIGKILL, processes)
    if how != "killed":
        time.sleep(trial.plan.seconds)
    if how == "hangs":
        trial.send(SIGCONT, processes)
    if how == "away":
        trial.home.up()


def down_and_up(trial: Trial) -> None:
    trial.home.start("down").end()
    trial.home.up()


def power_cut(trial: Trial) -> None:
    trial.send(SIGKILL, [*trial.home.servers(*SERVER_NAMES), *trial.home.others()])


def cache(how: str, victim: str, trial: Trial) -> None:
    """Damages what is in the cache, and has it read again: by a resume, or by a rank that is started again."""
    for path in (trial.home.folder / "cache").rglob("*"):
        if path.is_file() and len(path.name) == 64:  # named by its SHA-256
            content = path.read_bytes()
            path.unlink()
            if how != "deleted":
                path.write_bytes(_damaged(how, content, trial))
    signal(SIGKILL, victim, trial)


def checkpoint(how: str, trial: Trial) -> None:
    """Damages the newest checkpoint in the bucket, once the flow is killed."""
    _kill_flow(trial)
    store, run = trial.home.store(), trial.training.run_id if trial.training else ""
    keys = [info.key for info in store.list(f"runs/{run}/checkpoints/") if info.key.endswith(".safetensors")]
    for key in sorted(keys)[-1:]:
        content = store.get_bytes(key)
        store.delete(key)
        if how != "deleted":
            store.put_bytes(key, _damaged(how, content, trial))


def disk_full(folder: str, trial: Trial) -> None:
    filler = trial.home.folder / folder / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            with suppress(OSError):
                while file.write(bytes(size)) == size:
                    pass
    time.sleep(trial.plan.seconds)
    filler.unlink()


def resumed(times: int, trial: Trial) -> None:
    """Resumes so many times at once; a single one does so while the training runs."""
    if times > 1:
        _kill_flow(trial)
    for _ in range(times if trial.runs() else 0):
        trial.resume()


def beside(command: tuple[str, ...], trial: Trial) -> None:
    """Runs a command twice at once beside the training, which must not mind."""
    commands = [trial.home.start(*command) for _ in range(2)]
    trial.noticed += [str(each) for each in commands if each.end().returncode]


def _kill_flow(trial: Trial) -> None:
    signal(SIGKILL, "flow", trial)
    trial.commands[0].end()


def _damaged(how: str, content: bytes, trial: Trial) -> bytes:
    """Returns the content with one bit of its latter half flipped, or without that half."""
    draw = random.Random(trial.plan.seed)
    at = draw.randrange(len(content) // 2, len(content))
    return content[:at] + (bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]) * (how == "flipped")
