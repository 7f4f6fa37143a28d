"""Launcher for Kubernetes: agents in the pods of an Indexed Job.

A plain Job is enough: Kubernetes replaces lost pods, and agents find each other through the bucket and use the pods'
addresses. So there is no operator, no headless service, and no pod that must be the first.
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
from tasks.config.launchers import KubernetesConfig
from tasks.training.launchers.watch import watching
from tasks.training.protocol.job import Event, Job, JobFolder

TEMPLATE = Path(infra.kubernetes.__path__[0]) / "training-job.yaml"
CACHE_FOLDER = "/var/lib/convoy/cache"  # in the template's CONVOY_HOME
GPU = "nvidia.com/gpu"


@contextmanager
def agents(folder: JobFolder) -> Iterator[None]:
    """Runs agents for a job in pods during the block.

    Raises:
        Outage: the cluster does not answer.
        UsageError: there is no cluster, or it refuses the Job.
    """
    manifest = training_job(folder.read_job(), Settings().pod)
    namespace = manifest["metadata"]["namespace"]
    jobs = Jobs(namespace)
    name = jobs.create(manifest)
    folder.write_event(Event(note=f"Kubernetes Job {namespace}/{name}"))
    try:
        with watching(lambda: jobs.pod_problems(name), folder):
            yield
    finally:
        try:
            jobs.delete(name)
        except (ServiceError, UsageError) as error:
            folder.write_event(Event(warning=f"Job {namespace}/{name} could not be deleted; delete it: {error}"))


def training_job(job: Job, flow_pod: str | None) -> dict[str, Any]:
    """Returns the manifest of a training's Job.

    Args:
        job: order to train; `launch.kubernetes.template` replaces infra/kubernetes/training-job.yaml.
        flow_pod: `namespace/name/uid` of the flow's pod, if it runs in one; Kubernetes deletes the Job with that pod.

    Raises:
        UsageError: the template cannot be used.
    """
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
        if config.cache:
            volume = {"name": "cache", "persistentVolumeClaim": {"claimName": config.cache}}
            pod["spec"]["volumes"].append(volume)
            agent["volumeMounts"].append({"name": "cache", "mountPath": CACHE_FOLDER})
        if "tasks.nodes.agent" in agent.get("command", ()):  # in copies of the template of Convoy 0.1
            agent["command"] = ["convoy", "join"]
        agent |= {"image": config.image, "args": [job.run_id], "resources": _resources(config)}
    except OSError as error:
        raise UsageError(f"kubernetes.template {template}: {error.strerror}") from None
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"kubernetes.template {template} is not a Job like {TEMPLATE.name}: {error!r}") from None
    return manifest


def _owner(flow_pod: str, namespace: str) -> list[Mapping[str, str]]:
    """Returns the flow's pod as owner; none from another namespace, which Kubernetes would treat as deleted."""
    where, name, uid = flow_pod.split("/")
    return [{"apiVersion": "v1", "kind": "Pod", "name": name, "uid": uid}] if where == namespace else []


def _resources(config: KubernetesConfig) -> dict[str, dict[str, str]]:
    """Returns a pod's resources; no CPU limit, since it would throttle ranks that wait for each other."""
    ranks = config.ranks_per_pod
    per_rank = config.memory or ("8Gi" if config.gpus else "2Gi")
    memory = f"{int(per_rank[:-2]) * ranks}{per_rank[-2:]}"
    gpus = {GPU: str(config.gpus * ranks)} if config.gpus else {}
    return {
        "requests": {"cpu": f"{config.cpus * ranks:g}", "memory": memory, **gpus},
        "limits": {"memory": memory, **gpus},
    }
