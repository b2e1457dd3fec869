"""What the bus's tests share: identities, allow-lists, a server on free ports, waiting."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import zmq

from foldd.core.digests import sha256_bytes
from foldd.core.files import point, write_file
from foldd.core.manifest import ArtifactEntry, Manifest, TaskEntry, sign_manifest
from foldd.core.signatures import Identity, new_identity
from foldd.core.wire import Reply, Request, decode_reply, encode
from foldd.daemon.bus.desk import current_generation
from foldd.daemon.bus.server import BusServer
from foldd.daemon.bus.settings import BusSettings

DAEMON, SUBMITTER, DEVICE, STRANGER = (new_identity(n) for n in ("daemon", "submitter", "device", "stranger"))
CHUNK = 1024


def admit(folder: Path, *identities: Identity) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for identity in identities:
        write_file(folder / f"{identity.name}.pub", msgspec.json.encode(identity.public))
    return folder


def noise(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def make_file(path: Path, size: int = 10 * CHUNK + 17, seed: int = 0) -> Path:
    path.write_bytes(noise(size, seed))
    return path


def publish(root: Path, generation: int, content: bytes) -> bytes:
    """Writes a generation whose artifact is any bytes; its signed manifest."""
    folder = root / "generations" / f"{generation:06d}"
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(content)
    artifact = ArtifactEntry(sha256_bytes(content), len(content), (4,), 3)
    tasks = {"cats": TaskEntry(2, "0" * 64)}
    manifest = Manifest(generation, None, "b" * 64, "average", "c" * 64, tasks, artifact, {}, "2026-11-23T00:00:00Z")
    data = sign_manifest(manifest, DAEMON)
    (folder / "manifest.json").write_bytes(data)
    point(root / "current", f"generations/{folder.name}")
    return data


@dataclass
class Box:
    """A daemon's bus with its state directory."""

    root: Path
    keys: Path
    server: BusServer
    submitted: list[Path] = field(default_factory=list)
    senders: list[str] = field(default_factory=list)

    @property
    def endpoint(self) -> str:
        return self.server.bind_endpoint


@contextmanager
def running(
    tmp_path: Path, *, plaintext: bool = False, known: dict[str, str] | None = None, **how: object
) -> Iterator[Box]:
    """A bus on free ports of the loopback, with one submitter and one device admitted."""
    keys, root, submitted, senders = tmp_path / "keys", tmp_path / "state", [], []

    def on_submitted(path: Path, sender: str) -> None:
        submitted.append(path)
        senders.append(sender)

    settings = BusSettings(**{
        "bind": "tcp://127.0.0.1:*", "announce": "tcp://127.0.0.1:*", "plaintext": plaintext,
        "submitters": "" if plaintext else str(admit(keys / "submitters", SUBMITTER)),
        "devices": "" if plaintext else str(admit(keys / "devices", DEVICE)),
        "chunk_bytes": CHUNK, "credit": 4, "min_free_bytes": 0, "allow_list_poll_s": 0.05, **how,
    })  # type: ignore[arg-type]  # fmt: skip
    server = BusServer(
        settings,
        None if plaintext else DAEMON,
        root,
        on_submitted,
        lambda: current_generation(root),
        known=(known or {}).get,
    )
    server.start()
    try:
        yield Box(root, keys, server, submitted, senders)
    finally:
        server.stop()
        assert not server.alive


class RawClient:
    """A client without our manners: sends what it is told."""

    def __init__(
        self, endpoint: str, identity: Identity | None, server: Identity | None = DAEMON, kind: int = zmq.DEALER
    ) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self._context.socket(kind)
        self.socket.setsockopt(zmq.RECONNECT_IVL, 50)
        if identity is not None and server is not None:
            self.socket.curve_serverkey = bytes.fromhex(server.public.curve_public)
            self.socket.curve_publickey = bytes.fromhex(identity.public.curve_public)
            self.socket.curve_secretkey = bytes.fromhex(identity.curve_secret)
        if kind == zmq.SUB:
            self.socket.setsockopt(zmq.SUBSCRIBE, b"")
        self.socket.connect(endpoint)

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *raised: object) -> None:
        self._context.destroy(linger=0)

    def ask(self, request: Request, data: bytes | None = None, seconds: float = 5.0) -> tuple[Reply, bytes] | None:
        self.socket.send_multipart([encode(request)] if data is None else [encode(request), data])
        return self.answer(seconds)

    def answer(self, seconds: float = 5.0) -> tuple[Reply, bytes] | None:
        if not self.socket.poll(int(seconds * 1000)):
            return None
        frames = self.socket.recv_multipart()
        return decode_reply(frames[0]), frames[1] if len(frames) > 1 else b""


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Polls until a condition holds; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.01)
