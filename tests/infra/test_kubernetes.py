"""The manifests match Kubernetes' schemas, and Jobs are created and deleted through its API, without a real cluster."""

import json
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

import infra.kubernetes
from infra.errors import Outage, UsageError
from infra.kubernetes.jobs import Jobs
from tests.infra.kubernetesapi import KubernetesApi, assert_valid, kubernetes_api

FOLDER = Path(infra.kubernetes.__path__[0])
APPLIED, EXAMPLES = ("namespace", "rbac", "network-policy", "worker"), ("secret.example", "cache.example")
JOB: dict[str, Any] = {
    "apiVersion": "batch/v1",
    "kind": "Job",
    "metadata": {"generateName": "convoy-"},
    "spec": {"template": {"spec": {"restartPolicy": "Never", "containers": [{"name": "agent", "image": "i"}]}}},
}


def manifests(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / f"{name}.yaml").read_text()))


@pytest.mark.parametrize("name", APPLIED + EXAMPLES)
def test_manifests_are_valid(name: str) -> None:
    for manifest in manifests(name):
        assert_valid(manifest)


def test_kustomization_names_every_manifest_that_is_applied_as_it_is() -> None:
    (kustomization,) = manifests("kustomization")
    assert set(kustomization["resources"]) == {f"{name}.yaml" for name in APPLIED}
    (config,) = kustomization["configMapGenerator"]
    assert all((FOLDER / file).exists() for file in config["files"])


def test_worker_has_the_locked_version_of_prefect() -> None:
    (worker,) = manifests("worker")
    (container,) = worker["spec"]["template"]["spec"]["containers"]
    assert container["image"] == f"prefecthq/prefect:{version('prefect')}-python3.11-kubernetes"


def test_example_of_a_secret_holds_no_value() -> None:
    assert all(not value for secret in manifests("secret.example") for value in secret["stringData"].values())


def test_flows_may_do_what_the_launcher_does_and_trainings_nothing() -> None:
    everything = manifests("rbac")
    bound = {entry["subjects"][0]["name"]: entry["roleRef"]["name"] for entry in everything if "subjects" in entry}
    assert bound == {"convoy-worker": "convoy-worker", "convoy-flow": "convoy-flow"}
    (flow,) = (entry for entry in everything if entry["kind"] == "Role" and entry["metadata"]["name"] == "convoy-flow")
    allowed = {(resource, verb) for rule in flow["rules"] for resource in rule["resources"] for verb in rule["verbs"]}
    assert allowed == {("jobs", "create"), ("jobs", "delete"), ("pods", "list")}


def test_base_job_template_makes_a_valid_job() -> None:
    template = json.loads((FOLDER / "base-job-template.json").read_text())
    text = json.dumps(template["job_configuration"])
    used = set(re.findall(r"{{ (\w+) }}", text))
    assert used == set(template["variables"]["properties"])
    values: dict[str, Any] = {name: entry.get("default") for name, entry in template["variables"]["properties"].items()}
    values |= {"name": "flow", "image": "convoy:1", "command": ["python", "-m", "prefect.engine"]}
    for name, value in values.items():
        text = text.replace(f'"{{{{ {name} }}}}"', json.dumps(value)).replace(f"{{{{ {name} }}}}", str(value))
    assert_valid(json.loads(text)["job_manifest"])


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesApi]:
    with kubernetes_api() as server:
        monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path)))
        yield server


def test_job_is_created_and_deleted_with_its_pods(api: KubernetesApi) -> None:
    jobs = Jobs("convoy")
    name = jobs.create(JOB)
    assert name in api.jobs
    jobs.delete(name)
    ((path, options),) = api.deleted
    assert path.startswith(f"/apis/batch/v1/namespaces/convoy/jobs/{name}")
    assert "propagationPolicy=Background" in path or options.get("propagationPolicy") == "Background"
    jobs.delete(name)  # deleted already


def test_each_problem_of_a_pod_is_one_line(api: KubernetesApi) -> None:
    unplaced = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no node has a GPU"}
    waiting = {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}
    starting = {"waiting": {"reason": "ContainerCreating"}}
    ended = {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}
    container = {"name": "agent", "image": "i", "imageID": "", "ready": False, "restartCount": 0}
    api.pods = [
        {"status": {"phase": "Pending", "conditions": [unplaced]}},
        *({"status": {"containerStatuses": [{**container, "state": state}]}} for state in (waiting, starting, ended)),
    ]
    assert Jobs("convoy").pod_problems("j") == [
        "a pod does not start: ImagePullBackOff no such image",
        "a pod has ended: OOMKilled (exit status 137)",
        "a pod has no place: no node has a GPU",
    ]


@pytest.mark.parametrize(("status", "kind"), [(403, UsageError), (422, UsageError), (503, Outage)])
def test_refusals_are_one_line(api: KubernetesApi, status: int, kind: type[Exception]) -> None:
    api.refuse = status
    with pytest.raises(kind, match=f"create a Job in namespace convoy: {status}.*as the test wants it") as caught:
        Jobs("convoy").create(JOB)
    assert "\n" not in str(caught.value)
    assert "token-of-a-test" not in str(caught.value)


def test_no_cluster_is_a_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(UsageError, match="no Kubernetes cluster"):
        Jobs("convoy")
