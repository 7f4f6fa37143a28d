"""Agents in a Ray cluster: one actor a rank, each in a bundle of a placement group, that runs an agent.

Ray places the actors, and starts those of a lost node again where there is room; coordinator and agents do the rest, as
with any other nodes. Convoy must be installed on the Ray nodes. Ray pickles the actor's class and its arguments on its
own wire; nothing of Convoy's is stored that way.
"""

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from infra.errors import Outage, UsageError, one_line
from infra.machine.lifeline import dying_with_this_process
from tasks.config.launchers import RayConfig, RayLaunch
from tasks.training.launchers.watch import watching
from tasks.training.protocol.job import JobFolder

CONNECTS_WITHIN = 30.0  # seconds
LEAVE = 5.0  # seconds that agents have to find that the training is over

ACCESS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "CONVOY_BUCKET",
    "DO_NOT_TRACK",
    "GIT_PYTHON_REFRESH",
    "MLFLOW_DISABLE_TELEMETRY",
    "MLFLOW_REGISTRY_URI",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_URI",
    "MLFLOW_TRACKING_USERNAME",
)
"""Variables of the storage and of MLflow that agents are told. What is unset here, the Ray node's own may say; files,
such as of AWS profiles, are the node's anyway."""


class AgentHost:
    """The actor: keeps a process with an agent in it."""

    def run(self, run_id: str, access: dict[str, str]) -> str:
        """Run an agent until it ends.

        Args:
            run_id: the training.
            access: variables that give access to the servers. They come as an argument of this call, which goes from
                the driver to this process and to nowhere else: a `runtime_env` would be shown on Ray's dashboard and
                written to its logs, and arguments of the actor itself are kept by Ray's control store.

        Returns:
            What was wrong; empty if nothing was.
        """
        address = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
        environment = {
            "CONVOY_HOME": str(Path.home() / ".cache" / "convoy"),
            "CONVOY_ADDRESS": address,
            **os.environ,
            **access,
            "CONVOY_SLOTS": "1",
            "PYTHONSAFEPATH": "1",  # else `-m` looks for our modules in the working folder first
        }
        # This is the actor's main thread, as the kernel's death signal wants it: it asks for the thread that forked.
        agent = subprocess.Popen(
            [sys.executable, "-m", "tasks.training.nodes.agent", run_id],
            env=environment,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=dying_with_this_process(),
        )
        _, said = agent.communicate()
        sys.stderr.write(said)  # to the actor's log
        if not agent.returncode:
            return ""
        last = (said.strip().splitlines() or [f"exit status {agent.returncode}"])[-1]
        return f"the agent on Ray node {address} ended: {last.removeprefix('error: ')}"


@contextmanager
def agents(folder: JobFolder) -> Iterator[None]:
    """Have a Ray cluster run an agent for each rank of a job, as long as the context lasts.

    However this process ends, Ray ends the actors with it, and the kernel the agents with them.

    Raises:
        Outage: there is no such cluster, or it does not answer.
        UsageError: it cannot be used, by its version for example.
    """
    job = folder.read_job()
    assert isinstance(job.launch, RayLaunch)
    config = job.launch.ray
    _connect(config)
    bundle = {kind: float(amount) for kind, amount in (("CPU", config.cpus), ("GPU", config.gpus)) if amount}
    group = placement_group([bundle] * job.world_size, strategy=config.strategy, name=f"convoy-{job.run_id}")
    host: Any = ray.remote(AgentHost)
    actors = [
        host.options(
            name=f"convoy-{job.run_id}-{number}",
            num_cpus=config.cpus,
            num_gpus=config.gpus,
            max_restarts=-1,
            max_task_retries=-1,  # the driver repeats the call, and so its arguments, to an actor that was restarted
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number),
        ).remote()
        for number in range(job.world_size)
    ]
    access = {name: value for name in ACCESS if (value := os.environ.get(name)) is not None}
    runs = {actor.run.remote(job.run_id, access): actor for actor in actors}

    def look() -> Iterator[str]:
        """Start agents again that have ended; says why they had, and what there is no room for."""
        ended, _ = ray.wait(list(runs), num_returns=len(runs), timeout=0)
        for run in ended:
            actor = runs.pop(run)
            try:
                said = ray.get(run)
            except RayError as error:
                said = f"Ray cannot run an agent: {one_line(error)[:300]}"
            if said:
                yield said
            runs[actor.run.remote(job.run_id, access)] = actor
        if placement_group_table(group)["state"] != "CREATED":
            yield f"Ray has no room for {len(actors)} ranks with {bundle} each; waiting for more nodes"

    try:
        with watching(look, folder):
            yield
        ray.wait(list(runs), num_returns=len(runs), timeout=LEAVE)
    finally:
        for actor in actors:
            ray.kill(actor)
        remove_placement_group(group)
        ray.shutdown()


def _connect(config: RayConfig) -> None:
    """Become a driver of the cluster.

    In a thread of its own, since Ray waits without end for a cluster that does not answer, deaf to signals; and since
    from there it leaves the signals' handlers as they are.
    """
    failures: list[Exception] = []

    def connect() -> None:
        try:
            ray.init(config.address or "auto", log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:
            failures.append(error)

    logging.getLogger("ray").setLevel(logging.ERROR)  # it would tell people that it left a handler alone
    thread = threading.Thread(target=connect, name="connect", daemon=True)
    thread.start()
    thread.join(CONNECTS_WITHIN)
    where = config.address or os.environ.get("RAY_ADDRESS", "this machine")
    if thread.is_alive():
        raise Outage(f"the Ray cluster at {where} has not answered for {CONNECTS_WITHIN:g} s")
    for error in failures:
        if isinstance(error, ConnectionError):
            raise Outage(f"no Ray cluster at {where}; is this machine a node of it (`ray start`)? {_line(error)}")
        raise UsageError(f"the Ray cluster at {where} cannot be used: {_line(error)}")


def _line(error: Exception) -> str:
    return one_line(error)[:300]
