"""Jobs of a Kubernetes cluster: create, delete, and see why pods do not run."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from kubernetes.config.config_exception import ConfigException
from urllib3.exceptions import HTTPError

from infra.errors import Outage, ServiceError, UsageError, one_line

ANSWERS_WITHIN = (5.0, 15.0)  # seconds to connect, and for an answer
NOT_FOUND = 404


class Jobs:
    """The Jobs of a namespace.

    Every method raises Outage while the cluster does not answer, UsageError if it may not be asked or refuses what it
    was given, and ServiceError if it fails otherwise.
    """

    def __init__(self, namespace: str) -> None:
        """Take the cluster that this pod is in, or else the one that the user's kubeconfig (KUBECONFIG) names.

        Raises:
            UsageError: there is neither.
        """
        try:
            if "KUBERNETES_SERVICE_HOST" in os.environ:
                config.load_incluster_config()  # type: ignore[no-untyped-call]
            else:
                config.load_kube_config(os.environ.get("KUBECONFIG"))  # type: ignore[no-untyped-call]
        except ConfigException as error:
            raise UsageError(f"no Kubernetes cluster: {error}") from error
        self._namespace = namespace
        self._batch: Any = client.BatchV1Api()  # its types are of models, its bodies may be plain
        self._core: Any = client.CoreV1Api()

    def create(self, manifest: Mapping[str, Any]) -> str:
        """Create a Job; returns its name."""
        with self._translated("create a Job"):
            made = self._batch.create_namespaced_job(self._namespace, manifest, _request_timeout=ANSWERS_WITHIN)
            return str(made.metadata.name)

    def delete(self, name: str) -> None:
        """Delete a Job with its pods, which have their grace period; one that is gone already is no mistake."""
        with self._translated("delete a Job"):
            try:
                self._batch.delete_namespaced_job(
                    name, self._namespace, propagation_policy="Background", _request_timeout=ANSWERS_WITHIN
                )
            except ApiException as error:
                if error.status != NOT_FOUND:
                    raise

    def troubles(self, name: str) -> list[str]:
        """What keeps pods of a Job from running, a line each."""
        with self._translated("list the pods of a Job"):
            pods = self._core.list_namespaced_pod(
                self._namespace, label_selector=f"batch.kubernetes.io/job-name={name}", _request_timeout=ANSWERS_WITHIN
            ).items
        return sorted({trouble for pod in pods for trouble in _troubles(pod.status)})

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        try:
            yield
        except ApiException as error:
            said = f"Kubernetes refuses to {what} in namespace {self._namespace}: {error.status} {error.reason}"
            if error.status in (400, 401, 403, NOT_FOUND, 422):
                raise UsageError(
                    f"{said}; see infra/kubernetes/README.md for what it needs{_message(error)}"
                ) from error
            kind = Outage if error.status == 429 or error.status >= 500 else ServiceError
            raise kind(said + _message(error)) from error
        except HTTPError as error:
            raise Outage(f"the Kubernetes API does not answer: {one_line(error)[:200]}") from error


def _message(error: ApiException) -> str:
    """What the server says beside the status, shortened."""
    body = error.body.decode(errors="replace") if isinstance(error.body, bytes) else error.body or ""
    return f" ({one_line(body)[:300]})" if body else ""


def _troubles(status: Any) -> Iterator[str]:
    for condition in status.conditions or ():
        if condition.type == "PodScheduled" and condition.status == "False":
            yield f"a pod has no place: {condition.message or condition.reason}"
    for container in status.container_statuses or ():
        waiting, ended = container.state.waiting, container.state.terminated
        if waiting and waiting.reason not in ("ContainerCreating", "PodInitializing"):
            yield f"a pod does not start: {waiting.reason} {waiting.message or ''}".rstrip()
        if ended and ended.exit_code:
            yield f"a pod has ended: {ended.reason} (exit status {ended.exit_code})"
