"""The HTTP server on the device."""

from __future__ import annotations

import http.client
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runtime_kit import publish, samples

from foldd.runtime.client import Runtime
from foldd.runtime.server import MAX_BODY_BYTES, InferenceServer


@pytest.fixture
def server(tmp_path: Path) -> Iterator[InferenceServer]:
    server = InferenceServer(("127.0.0.1", 0), Runtime(tmp_path, threads=1))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join(5)
    server.server_close()


def ask(
    server: InferenceServer, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[Any, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response, response.read()
    finally:
        connection.close()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def test_answers_as_json_and_as_npy(server: InferenceServer, tmp_path: Path) -> None:
    publish(tmp_path, 3)
    assert server.runtime.poll(0) == 3
    response, body = ask(server, "POST", "/v1/infer/cats", npy(samples(2)))
    assert response.status == 200
    assert response.headers["X-Foldd-Generation"] == "3"
    assert json.loads(body) == {
        "generation": 3,
        "task": "cats",
        "logits": [[3.0, 3.0], [3.0, 3.0]],
        "classes": ["cats-0", "cats-0"],
    }
    response, body = ask(server, "POST", "/v1/infer/cats", npy(samples(2)), Accept="application/x-npy")
    assert response.headers["X-Foldd-Generation"] == "3"
    assert np.array_equal(np.load(io.BytesIO(body)), np.full((2, 2), 3.0))


def test_is_healthy_only_while_it_serves(server: InferenceServer, tmp_path: Path) -> None:
    assert ask(server, "GET", "/healthz")[0].status == 503
    assert ask(server, "POST", "/v1/infer/cats", npy(samples()))[0].status == 503
    assert json.loads(ask(server, "GET", "/v1/status")[1])["generation"] is None
    publish(tmp_path, 1)
    server.runtime.poll(0)
    assert ask(server, "GET", "/healthz")[0].status == 200
    facts = json.loads(ask(server, "GET", "/v1/status")[1])
    assert (facts["generation"], facts["tasks"], facts["input_shape"]) == (1, ["cats", "dogs"], [4])


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/v1/infer/cta", npy(samples()), 404, "unknown-task"),
        ("/v1/infer/cats", npy(np.ones((1, 5), np.float32)), 400, "wrong-shape"),
        ("/v1/infer/cats", npy(np.ones((1, 4))), 400, "wrong-type"),
        ("/v1/infer/cats", b"PK\x03\x04 not an archive", 400, "not-npy"),
        ("/v1/infer/cats", b"", 400, "not-npy"),
        ("/v1/infer/cats", npy(samples())[:-1], 400, "not-npy"),
        ("/v1/infer/cats", npy(samples()) + b"x", 400, "not-npy"),
        ("/v1/infer/cats", npy(np.array([print], dtype=object)), 400, "not-npy"),
        ("/v1/infer/cats", b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 100, 400, "not-npy"),
        ("/v1/other", b"", 404, "no-such-path"),
    ],
)
def test_what_is_wrong_gets_its_code(
    server: InferenceServer, tmp_path: Path, path: str, body: bytes, status: int, code: str
) -> None:
    publish(tmp_path, 1)
    server.runtime.poll(0)
    response, answer = ask(server, "POST", path, body)
    assert response.status == status
    assert json.loads(answer)["error"]["code"] == code
    assert ask(server, "POST", "/v1/infer/cats", npy(samples()))[0].status == 200


def test_a_header_that_promises_terabytes_costs_nothing(server: InferenceServer, tmp_path: Path) -> None:
    publish(tmp_path, 1)
    server.runtime.poll(0)
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": (2**40, 4)})
    assert ask(server, "POST", "/v1/infer/cats", buffer.getvalue())[0].status == 400


def test_too_large_a_body_is_not_read(server: InferenceServer) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
    connection.putrequest("POST", "/v1/infer/cats")
    connection.putheader("Content-Length", str(MAX_BODY_BYTES + 1))
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()
