"""Creates and deletes Jobs of a Kubernetes cluster, and reports why their pods do not run."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from infra.errors import Outage, ServiceError, UsageError, one_line

REQUEST_SECONDS = (5.0, 15.0)  # timeouts of connection and answer
NOT_FOUND = 404


class Jobs:
    """The Jobs of a namespace.

    Every method raises Outage while the cluster does not answer, UsageError if the cluster refuses the request, and
    ServiceError if it fails otherwise.
    """

    def __init__(self, namespace: str) -> None:
        """Uses the cluster of this pod, or else the one that the user's kubeconfig (KUBECONFIG) names.

        Raises:
            UsageError: this process is in no pod, and there is no kubeconfig.
        """
        try:
            if "KUBERNETES_SERVICE_HOST" in os.environ:
                config.load_incluster_config()  # type: ignore[no-untyped-call]
            else:
                config.load_kube_config(os.environ.get("KUBECONFIG"))  # type: ignore[no-untyped-call]
        except Exception as error:  # of a malformed file, the client and its parser raise many kinds
            raise UsageError(f"no Kubernetes cluster: {one_line(error) or type(error).__name__}") from error
        self._namespace = namespace
        self._batch: Any = client.BatchV1Api()  # its types demand model classes, but plain dictionaries work
        self._core: Any = client.CoreV1Api()

    def create(self, manifest: Mapping[str, Any]) -> str:
        """Creates a Job; returns its name."""
        with self._translated("create a Job"):
            made = self._batch.create_namespaced_job(self._namespace, manifest, _request_timeout=REQUEST_SECONDS)
            return str(made.metadata.name)

    def delete(self, name: str) -> None:
        """Deletes a Job with its pods, which get their grace period; a Job that does not exist is no error."""
        with self._translated("delete a Job"):
            try:
                self._batch.delete_namespaced_job(
                    name, self._namespace, propagation_policy="Background", _request_timeout=REQUEST_SECONDS
                )
            except ApiException as error:
                if error.status != NOT_FOUND:
                    raise

    def pod_problems(self, name: str) -> list[str]:
        """Returns what keeps pods of a Job from running, one line per problem."""
        with self._translated("list the pods of a Job"):
            pods = self._core.list_namespaced_pod(
                self._namespace, label_selector=f"batch.kubernetes.io/job-name={name}", _request_timeout=REQUEST_SECONDS
            ).items
        return sorted({problem for pod in pods for problem in _problems(pod.status)})

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        try:
            yield
        except ApiException as error:
            refusal = f"Kubernetes refuses to {what} in namespace {self._namespace}: {error.status} {error.reason}"
            if error.status in (400, 401, 403, NOT_FOUND, 422):
                raise UsageError(
                    f"{refusal}; infra/kubernetes/README.md says what it needs{_message(error)}"
                ) from error
            kind = Outage if error.status == 429 or error.status >= 500 else ServiceError
            raise kind(refusal + _message(error)) from error
        except HTTPError as error:
            raise Outage(f"the Kubernetes API does not answer: {one_line(error)[:200]}") from error


def _message(error: ApiException) -> str:
    """Returns the server's message, shortened, in parentheses."""
    body = error.body.decode(errors="replace") if isinstance(error.body, bytes) else error.body or ""
    return f" ({one_line(body)[:300]})" if body else ""


def _problems(status: Any) -> Iterator[str]:
    for condition in status.conditions or ():
        if condition.type == "PodScheduled" and condition.status == "False":
            yield f"a pod has no place: {condition.message or condition.reason}"
    for container in status.container_statuses or ():
        waiting, ended = container.state.waiting, container.state.terminated
        if waiting and waiting.reason not in ("ContainerCreating", "PodInitializing"):
            yield f"a pod does not start: {waiting.reason} {waiting.message or ''}".rstrip()
        if ended and ended.exit_code:
            yield f"a pod has ended: {ended.reason} (exit status {ended.exit_code})"
