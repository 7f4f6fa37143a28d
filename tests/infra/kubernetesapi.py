"""A small Kubernetes API server for tests: stores Jobs that match the schemas, and reports given states of pods."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml

VERSION = "1.34"


def assert_valid(manifest: dict[str, Any]) -> None:
    """Checks a manifest against Kubernetes' own schema; an unknown key is an error."""
    kubernetes_validate.validate(manifest, VERSION, strict=True)


class KubernetesApi(ThreadingHTTPServer):
    """A Kubernetes API server; `refuse` is the status of every answer, if set."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.jobs: dict[str, dict[str, Any]] = {}
        self.deleted: list[tuple[str, dict[str, Any]]] = []
        self.pods: list[dict[str, Any]] = []
        self.refuse = 0

    def kubeconfig(self, folder: Path) -> Path:
        """Writes a kubeconfig that names this server."""
        cluster = {"name": "here", "cluster": {"server": f"http://127.0.0.1:{self.server_port}"}}
        context = {"name": "here", "context": {"cluster": "here", "user": "me"}}
        user = {"name": "me", "user": {"token": "token-of-a-test"}}
        file = folder / "kubeconfig"
        content = {"clusters": [cluster], "contexts": [context], "users": [user], "current-context": "here"}
        file.write_text(yaml.safe_dump({"apiVersion": "v1", "kind": "Config", **content}))
        return file


class _Answers(BaseHTTPRequestHandler):
    server: KubernetesApi

    def do_POST(self) -> None:
        if self._refused():
            return
        job = self._body()
        try:
            assert_valid(job)
        except kubernetes_validate.ValidationError as error:
            return self._answer(422, {"kind": "Status", "message": str(error)})
        job["metadata"]["name"] = job["metadata"]["generateName"] + "x7k2p"
        self.server.jobs[job["metadata"]["name"]] = job
        self._answer(201, job)

    def do_DELETE(self) -> None:
        if self._refused():
            return
        name = self.path.split("?")[0].rsplit("/", 1)[1]
        options = self._body()
        if self.server.jobs.pop(name, None) is None:
            return self._answer(404, {"kind": "Status", "reason": "NotFound"})
        self.server.deleted.append((self.path, options))
        self._answer(200, {"kind": "Status", "status": "Success"})

    def do_GET(self) -> None:
        if not self._refused():
            self._answer(200, {"kind": "PodList", "apiVersion": "v1", "items": self.server.pods})

    def _refused(self) -> bool:
        if self.server.refuse:
            self._body()
            self._answer(self.server.refuse, {"kind": "Status", "message": "as the test wants it"})
        return bool(self.server.refuse)

    def _body(self) -> dict[str, Any]:
        return json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def kubernetes_api() -> Iterator[KubernetesApi]:
    """Runs a server until the context ends."""
    with KubernetesApi() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
