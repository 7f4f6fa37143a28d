"""Agents in the pods of an Indexed Job.

A plain Job is all it takes: pods that are lost come back, and since agents find each other through the bucket and talk
by the addresses of their pods, there is no operator, no headless service, and no pod that must be the first.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

import infra.kubernetes
from infra.errors import ServiceError, UsageError
from infra.kubernetes.jobs import Jobs
from infra.settings import Settings
from tasks.config.launchers import KubernetesConfig, KubernetesLaunch
from tasks.training.launchers.watch import watching
from tasks.training.protocol.job import Event, Job, JobFolder

TEMPLATE = Path(infra.kubernetes.__path__[0]) / "training-job.yaml"
GPU = "nvidia.com/gpu"


@contextmanager
def agents(folder: JobFolder) -> Iterator[None]:
    """Have pods run agents for a job, as long as the context lasts.

    Raises:
        Outage: the cluster does not answer.
        UsageError: there is none, or it refuses the Job.
    """
    manifest = training_job(folder.read_job(), Settings().pod)
    namespace = manifest["metadata"]["namespace"]
    jobs = Jobs(namespace)
    name = jobs.create(manifest)
    folder.write_event(Event(note=f"Kubernetes Job {namespace}/{name}"))
    try:
        with watching(lambda: jobs.troubles(name), folder):
            yield
    finally:
        try:
            jobs.delete(name)
        except (ServiceError, UsageError) as error:
            folder.write_event(Event(warning=f"Job {name} is left: {error}"))


def training_job(job: Job, flow_pod: str | None) -> dict[str, Any]:
    """The manifest of a training's Job.

    Args:
        job: order to train; its `launch.kubernetes` names a template, or else it is infra/kubernetes/training-job.yaml.
        flow_pod: `namespace/name/uid` of the pod that the flow runs in, if it does, with which Kubernetes deletes the
            Job then.

    Raises:
        UsageError: the template cannot be used.
    """
    assert isinstance(job.launch, KubernetesLaunch)
    config = job.launch.kubernetes
    template = config.template or TEMPLATE
    try:
        manifest: dict[str, Any] = yaml.safe_load(template.read_text(encoding="utf-8"))
        metadata, spec = manifest["metadata"], manifest["spec"]
        pod = spec["template"]
        (agent,) = (entry for entry in pod["spec"]["containers"] if entry["name"] == "agent")
        (secret,) = agent["envFrom"]
        environment: list[dict[str, Any]] = agent["env"]
        run_label = {"app.kubernetes.io/instance": job.run_id}
        metadata |= {"generateName": f"convoy-{job.run_id[:8]}-", "namespace": config.namespace}
        for labelled in (metadata, pod["metadata"]):
            labelled["labels"] |= run_label
        if flow_pod:
            metadata["ownerReferences"] = _owner(flow_pod, config.namespace)
        pods = config.pods or -(-job.world_size // config.ranks_per_pod)
        spec |= {"completions": pods, "parallelism": pods}
        pod["spec"]["serviceAccountName"] = config.service_account
        secret["secretRef"]["name"] = config.secret
        environment.append({"name": "CONVOY_SLOTS", "value": str(config.ranks_per_pod)})
        if "tasks.nodes.agent" in agent.get("command", ()):  # as in copies of the template of Convoy 0.1
            agent["command"] = ["convoy", "join"]
        agent |= {"image": config.image, "args": [job.run_id], "resources": _resources(config)}
    except OSError as error:
        raise UsageError(f"kubernetes.template {template}: {error.strerror}") from None
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"kubernetes.template {template} is no Job like {TEMPLATE.name}: {error!r}") from None
    return manifest


def _owner(flow_pod: str, namespace: str) -> list[Mapping[str, str]]:
    """The flow's pod as owner. One in another namespace cannot be: Kubernetes would take it for gone."""
    where, name, uid = flow_pod.split("/")
    return [{"apiVersion": "v1", "kind": "Pod", "name": name, "uid": uid}] if where == namespace else []


def _resources(config: KubernetesConfig) -> dict[str, dict[str, str]]:
    """Of a pod: no limit on processor time, which would throttle ranks that wait for each other."""
    ranks = config.ranks_per_pod
    memory = f"{int(config.memory[:-2]) * ranks}{config.memory[-2:]}"
    gpus = {GPU: str(config.gpus * ranks)} if config.gpus else {}
    return {
        "requests": {"cpu": f"{config.cpus * ranks:g}", "memory": memory, **gpus},
        "limits": {"memory": memory, **gpus},
    }
