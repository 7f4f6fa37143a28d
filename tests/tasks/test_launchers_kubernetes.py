"""The Job that launcher=kubernetes builds from a configuration."""

from pathlib import Path
from typing import Any

import pytest

from cnn.config.training import TrainConfig
from infra.errors import UsageError
from infra.settings import Settings
from tasks.config.launchers import KubernetesConfig, Launch, check_installed
from tasks.config.run import CheckpointConfig, load_config
from tasks.training.launchers.kubernetes import TEMPLATE, agents, training_job
from tasks.training.protocol.job import Job, JobFolder
from tests.infra.kubernetesapi import assert_valid, kubernetes_api

RUN = "0123456789abcdef0123456789abcdef"


def order(**kubernetes: Any) -> Job:
    return Job(
        run_id=RUN,
        config=TrainConfig(),
        dataset_version="0" * 64,
        world_size=4,
        launch=Launch(
            launcher="kubernetes", kubernetes=KubernetesConfig(image="registry.example/convoy:1", **kubernetes)
        ),
        manifest_digest="",
        checkpoints=CheckpointConfig(),
        restarts=0,
    )


def test_job_has_a_pod_for_each_rank() -> None:
    manifest = training_job(order(), None)
    assert_valid(manifest)
    assert manifest["spec"]["completions"] == manifest["spec"]["parallelism"] == 4
    pod = manifest["spec"]["template"]["spec"]
    (agent,) = pod["containers"]
    assert agent["args"] == [RUN]
    assert {"name": "CONVOY_SLOTS", "value": "1"} in agent["env"]
    assert agent["resources"] == {"requests": {"cpu": "1", "memory": "2Gi"}, "limits": {"memory": "2Gi"}}
    assert pod["automountServiceAccountToken"] is False
    assert "ownerReferences" not in manifest["metadata"]
    assert "<" not in str(manifest)  # nothing was left to fill in


def test_a_rank_with_a_gpu_gets_more_memory() -> None:
    (agent,) = training_job(order(gpus=1), None)["spec"]["template"]["spec"]["containers"]
    assert agent["resources"]["limits"] == {"memory": "8Gi", "nvidia.com/gpu": "1"}


def test_ranks_may_share_a_pod_with_its_gpus() -> None:
    manifest = training_job(order(ranks_per_pod=3, gpus=1, cpus=1.5, memory="500Mi", secret="s"), None)
    assert_valid(manifest)
    assert manifest["spec"]["completions"] == 2
    (agent,) = manifest["spec"]["template"]["spec"]["containers"]
    assert agent["resources"]["requests"] == {"cpu": "4.5", "memory": "1500Mi", "nvidia.com/gpu": "3"}
    assert agent["resources"]["limits"] == {"memory": "1500Mi", "nvidia.com/gpu": "3"}
    assert agent["envFrom"] == [{"secretRef": {"name": "s"}}]


def test_pods_may_keep_their_cache() -> None:
    manifest = training_job(order(cache="convoy-cache"), None)
    assert_valid(manifest)
    pod = manifest["spec"]["template"]["spec"]
    assert {"name": "cache", "persistentVolumeClaim": {"claimName": "convoy-cache"}} in pod["volumes"]
    (agent,) = pod["containers"]
    (home,) = (entry["value"] for entry in agent["env"] if entry["name"] == "CONVOY_HOME")
    assert {"name": "cache", "mountPath": str(Settings(home=Path(home)).cache)} in agent["volumeMounts"]


def test_job_belongs_to_the_flow_s_pod_in_the_same_namespace_only() -> None:
    manifest = training_job(order(), "convoy/flow-1/uid-1")
    assert_valid(manifest)
    (owner,) = manifest["metadata"]["ownerReferences"]
    assert owner == {"apiVersion": "v1", "kind": "Pod", "name": "flow-1", "uid": "uid-1"}
    assert training_job(order(namespace="other"), "convoy/flow-1/uid-1")["metadata"]["ownerReferences"] == []


def test_own_template_keeps_what_it_says(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(
        TEMPLATE.read_text().replace("restartPolicy: Never", "restartPolicy: Never\n      priorityClassName: p")
    )
    assert training_job(order(template=own), None)["spec"]["template"]["spec"]["priorityClassName"] == "p"
    own.write_text(TEMPLATE.read_text().replace("[convoy, join]", "[python, -m, tasks.nodes.agent]"))
    (agent,) = training_job(order(template=own), None)["spec"]["template"]["spec"]["containers"]
    assert agent["command"] == ["convoy", "join"]  # the module that copies of an older template name has moved
    own.write_text("kind: Pod")
    with pytest.raises(UsageError, match=r"is not a Job like training-job\.yaml"):
        training_job(order(template=own), None)
    with pytest.raises(UsageError, match="No such file"):
        training_job(order(template=tmp_path / "none.yaml"), None)


def test_image_must_be_named() -> None:
    with pytest.raises(UsageError, match=r"kubernetes\.image"):
        load_config(None, ["launcher=kubernetes"])


def test_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    check_installed("kubernetes")
    monkeypatch.setattr("tasks.config.launchers.find_spec", lambda name: None)
    check_installed("local")
    with pytest.raises(UsageError, match=r"pip install 'convoy-cnn\[kubernetes\]'"):
        check_installed("kubernetes")


def test_job_is_there_while_the_context_lasts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = JobFolder(tmp_path / "job")
    folder.write_job(order())
    with kubernetes_api() as api:
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(tmp_path)))
        with agents(folder):
            assert list(api.jobs) == ["convoy-01234567-x7k2p"]
        assert not api.jobs
        assert [event.note for event in folder.new_events()] == ["Kubernetes Job convoy/convoy-01234567-x7k2p"]
