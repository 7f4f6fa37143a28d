"""A real HTTP server on 127.0.0.1 for tests: ranges, validators, and faults on demand."""

import hashlib
import ssl
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

Fault = Literal["cut", "no ranges", "401", "403", "404", "413", "429", "500", "503"]


class WebServer:
    """Files by path; `faults` lists, per path, the faults of its next requests.

    Args:
        tls: the server's certificate and key, for https.
    """

    def __init__(self, tls: tuple[Path, Path] | None = None) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[Fault]] = {}
        self.headers: dict[str, dict[str, str]] = {}  # further ones, by path
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, Range
        self.sent = 0  # bytes of content
        self.lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                owner.answer(self)

            def do_HEAD(self) -> None:
                owner.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, request: object, client_address: object) -> None:
                if not isinstance(sys.exception(), ConnectionError):  # a client may disconnect at any time
                    super().handle_error(request, client_address)  # type: ignore[arg-type]

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self._server.server_port}"
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*tls)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def gets(self, path: str) -> list[str | None]:
        """Returns the Range of each GET of a path so far."""
        return [range_ for method, asked, range_ in self.requests if method == "GET" and asked == path]

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        """Serves one request."""
        path, asked = handler.path.partition("?")[0], handler.headers.get("Range")
        with self.lock:
            self.requests.append((handler.command, path, asked))
            faults = self.faults.get(path, []) if handler.command == "GET" else []
            fault = faults.pop(0) if faults else None
        if path not in self.files or (fault and fault.isdigit()):
            handler.send_error(int(fault or 404))
            return
        content = self.files[path]
        etag = f'"{hashlib.md5(content).hexdigest()}"'
        start = 0
        if asked and fault != "no ranges" and handler.headers.get("If-Range", etag) == etag:
            start = int(asked.removeprefix("bytes=").partition("-")[0])
            if start >= len(content):
                handler.send_response(416)
                handler.send_header("Content-Range", f"bytes */{len(content)}")
                handler.send_header("Content-Length", "0")
                handler.end_headers()
                return
            handler.send_response(206)
            handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            handler.send_response(200)
        for name, value in {"ETag": etag, **self.headers.get(path, {})}.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(content) - start))
        handler.end_headers()
        if handler.command == "HEAD":
            return
        body = content[start:]
        if fault == "cut":
            body = body[: len(body) // 2]
        with self.lock:
            self.sent += len(body)
        handler.wfile.write(body)
        if fault == "cut":
            handler.wfile.flush()
            handler.connection.shutdown(2)

    def close(self) -> None:
        """Stops the server."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextmanager
def web_server(tls: tuple[Path, Path] | None = None) -> Iterator[WebServer]:
    """Runs a server until the block ends; see `WebServer`."""
    server = WebServer(tls)
    try:
        yield server
    finally:
        server.close()
