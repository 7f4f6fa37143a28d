"""Launcher for Ray: one actor per rank, each in a bundle of a placement group, runs an agent.

Ray places the actors, and restarts those of a lost node on nodes with free resources; coordinator and agents do the
rest, as for other nodes. Convoy must be installed on the Ray nodes. Ray pickles the actor's class and its arguments on
its own wire; Convoy stores nothing that way.
"""

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from infra.errors import Outage, UsageError, one_line
from infra.machine.lifeline import dying_with_this_process
from tasks.config.launchers import RayConfig
from tasks.training.launchers.watch import watching
from tasks.training.protocol.job import JobFolder

CONNECT_TIMEOUT = 30.0
AGENTS_END_SECONDS = 5.0  # seconds that agents have to notice that the training is over

ACCESS_VARIABLES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "CONVOY_BUCKET",
    "CONVOY_S3_ADDRESSING",
    "DO_NOT_TRACK",
    "GIT_PYTHON_REFRESH",
    "MLFLOW_DISABLE_TELEMETRY",
    "MLFLOW_REGISTRY_URI",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_URI",
    "MLFLOW_TRACKING_USERNAME",
)
"""Variables for the storage and MLflow that agents receive. One that is unset here keeps the Ray node's own value, and
files, such as AWS profiles, are always the node's."""


class AgentHost:
    """The actor: runs an agent in a child process."""

    def run(self, run_id: str, access: dict[str, str], project: str) -> str:
        """Runs an agent until it ends.

        Args:
            run_id: the training.
            access: variables that give access to the servers. Only an argument of this call stays between the driver
                and this process: Ray's dashboard and logs show a `runtime_env`, and Ray's control store keeps arguments
                of the actor itself.
            project: the flow's working folder, which holds networks of one's own; the agent's too, where it exists.

        Returns:
            The agent's error in one line; empty after success.
        """
        address = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
        environment = {
            "CONVOY_HOME": str(Path.home() / ".cache" / "convoy"),
            "CONVOY_ADDRESS": address,
            **os.environ,
            **access,
            "CONVOY_SLOTS": "1",
            "PYTHONSAFEPATH": "1",  # else `-m` searches the working folder first
        }
        # In the actor's main thread: the kernel sends the death signal when the thread that forked ends.
        agent = subprocess.Popen(
            [sys.executable, "-m", "tasks.training.nodes.agent", run_id],
            cwd=project if os.path.isdir(project) else None,
            env=environment,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=dying_with_this_process(),
        )
        _, printed = agent.communicate()
        sys.stderr.write(printed)  # to the actor's log
        if not agent.returncode:
            return ""
        last = (printed.strip().splitlines() or [f"exit status {agent.returncode}"])[-1]
        return f"the agent on Ray node {address} ended: {last.removeprefix('error: ')}"


@contextmanager
def agents(folder: JobFolder) -> Iterator[None]:
    """Runs an agent in a Ray cluster for each rank of a job, during the block.

    However this process ends, Ray ends the actors with it, and the kernel ends the agents with the actors.

    Raises:
        Outage: there is no cluster, or it does not answer.
        UsageError: the cluster cannot be used, for example because of its version.
    """
    job = folder.read_job()
    config = job.launch.ray
    with chdir(folder.path):  # Ray's workers search the driver's working folder first; a user's may hold a `tasks`, too
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
            max_task_retries=-1,  # the driver repeats the call, with its arguments, to a restarted actor
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number),
        ).remote()
        for number in range(job.world_size)
    ]
    access = {name: value for name in ACCESS_VARIABLES if (value := os.environ.get(name)) is not None}
    runs = {actor.run.remote(job.run_id, access, os.getcwd()): actor for actor in actors}

    def poll() -> Iterator[str]:
        """Restarts agents that have ended; yields why they ended, and which resources are missing."""
        ended, _ = ray.wait(list(runs), num_returns=len(runs), timeout=0)
        for run in ended:
            actor = runs.pop(run)
            try:
                failure = ray.get(run)
            except RayError as error:
                failure = f"Ray cannot run an agent: {_short(error)}"
            if failure:
                yield failure
            runs[actor.run.remote(job.run_id, access, os.getcwd())] = actor
        if placement_group_table(group)["state"] != "CREATED":
            yield f"Ray lacks resources for {len(actors)} ranks with {bundle} each; waiting for more nodes"

    try:
        with watching(poll, folder):
            yield
        ray.wait(list(runs), num_returns=len(runs), timeout=AGENTS_END_SECONDS)
    finally:
        for actor in actors:
            ray.kill(actor)
        remove_placement_group(group)
        ray.shutdown()


def _connect(config: RayConfig) -> None:
    """Connects to the cluster as a driver.

    In a thread, since Ray ignores signals while it waits, without end, for a cluster that does not answer. From a
    thread, it also leaves the signal handlers as they are.
    """
    failures: list[Exception] = []

    def connect() -> None:
        try:
            ray.init(config.address or "auto", log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:
            failures.append(error)

    logging.getLogger("ray").setLevel(logging.ERROR)  # it would warn that it left a handler alone
    thread = threading.Thread(target=connect, name="connect", daemon=True)
    thread.start()
    thread.join(CONNECT_TIMEOUT)
    where = config.address or os.environ.get("RAY_ADDRESS", "this machine")
    if thread.is_alive():
        raise Outage(f"the Ray cluster at {where} has not answered for {CONNECT_TIMEOUT:g} s")
    for error in failures:
        if isinstance(error, ConnectionError):
            raise Outage(f"no Ray cluster at {where}; is this machine a node of it (`ray start`)? {_short(error)}")
        raise UsageError(f"the Ray cluster at {where} cannot be used: {_short(error)}")


def _short(error: Exception) -> str:
    return one_line(error)[:300]
