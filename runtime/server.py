"""A small HTTP server in front of a slot, for programs that are not Python.

    POST /v1/infer/<task>   body: .npy [n, *input_shape]  → {"generation", "task", "logits", "classes"} or .npy
    GET  /healthz           200 while a generation is served, else 503
    GET  /v1/status         what is served, and what is wrong

Meant for programs on the same device: it has no authentication, so the default is loopback.
"""

from __future__ import annotations

import io
import json
import logging
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import numpy as np

from foldd.core.errors import BadInput, FolddError
from foldd.runtime.client import Runtime
from foldd.runtime.npy import parse_npy

log = logging.getLogger("foldd.runtime")

MAX_BODY_BYTES = 64 * 1024 * 1024
_REQUEST_S = 30.0  # a client that is slower than that loses its connection
_NPY = "application/x-npy"
_INFER = "/v1/infer/"


class InferenceServer(ThreadingHTTPServer):
    """Serves one `Runtime`; `serve_forever` and `shutdown` as in the standard library."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], runtime: Runtime) -> None:
        self.runtime = runtime
        super().__init__(address, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("a connection from %s failed", client_address, exc_info=True)

    @property
    def url(self) -> str:
        return f"http://{self.server_address[0]!s}:{self.server_address[1]}"


def status(runtime: Runtime) -> dict[str, Any]:
    """What `/v1/status` says."""
    try:
        session = runtime.slot.session
    except FolddError:
        session = None
    errors = [error.as_dict() for error in (runtime.last_error, runtime.slot.last_error) if error is not None]
    manifest = None if session is None else session.manifest
    return {
        "generation": None if manifest is None else manifest.generation,
        "tasks": [] if session is None else list(session.tasks),
        "input_shape": None if manifest is None else list(manifest.artifact.input_shape),
        "artifact_sha256": None if manifest is None else manifest.artifact.sha256,
        "created": None if manifest is None else manifest.created,
        "errors": errors,
    }


class _Handler(BaseHTTPRequestHandler):
    server: InferenceServer
    server_version = "foldd-runtime"
    sys_version = ""
    protocol_version = "HTTP/1.1"
    timeout = _REQUEST_S

    def do_GET(self) -> None:
        runtime = self.server.runtime
        if self.path == "/healthz":
            healthy = runtime.slot.generation is not None
            self._json(HTTPStatus.OK if healthy else HTTPStatus.SERVICE_UNAVAILABLE, {"healthy": healthy})
        elif self.path == "/v1/status":
            self._json(HTTPStatus.OK, status(runtime))
        else:
            self._error(HTTPStatus.NOT_FOUND, "no-such-path", "There is /healthz, /v1/status and /v1/infer/<task>.")

    def do_POST(self) -> None:
        if not self.path.startswith(_INFER):
            self.close_connection = True  # the body is not read
            self._error(HTTPStatus.NOT_FOUND, "no-such-path", "Post to /v1/infer/<task>.")
            return
        task = unquote(self.path[len(_INFER) :])
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or len(length) > 12 or int(length) > MAX_BODY_BYTES:
            self.close_connection = True
            what = f"A Content-Length of at most {MAX_BODY_BYTES} bytes is needed."
            self._error(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "body-size", what)
            return
        body = self.rfile.read(int(length))
        try:
            inputs = parse_npy(body)
            session = self.server.runtime.slot.session
            logits = session.infer(task, inputs)
        except FolddError as error:
            code = HTTPStatus.BAD_REQUEST if isinstance(error, BadInput) else HTTPStatus.SERVICE_UNAVAILABLE
            if error.code == "unknown-task":
                code = HTTPStatus.NOT_FOUND
            self._json(code, {"error": error.as_dict()})
            return
        if self.headers.get("Accept", "") == _NPY:
            buffer = io.BytesIO()
            np.save(buffer, logits)
            self._send(HTTPStatus.OK, _NPY, buffer.getvalue(), session.generation)
            return
        answer: dict[str, Any] = {"generation": session.generation, "task": task, "logits": logits.tolist()}
        if (names := session.manifest.tasks[task].names) is not None:
            answer["classes"] = [names[i] for i in logits.argmax(axis=-1)]
        self._json(HTTPStatus.OK, answer, session.generation)

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)

    def _error(self, code: HTTPStatus, name: str, what: str) -> None:
        self._json(code, {"error": {"code": name, "what": what}})

    def _json(self, code: HTTPStatus, value: Any, generation: int | None = None) -> None:
        self._send(code, "application/json", json.dumps(value).encode() + b"\n", generation)

    def _send(self, code: HTTPStatus, kind: str, body: bytes, generation: int | None) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if generation is not None:
            self.send_header("X-Foldd-Generation", str(generation))
        self.end_headers()
        self.wfile.write(body)
