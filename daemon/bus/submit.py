"""The submitting client: sends one file and returns when the daemon has it durably."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from foldd.core.bundle import MAX_BUNDLE_BYTES
from foldd.core.digests import sha256_file
from foldd.core.errors import BadCheckpoint, BadRequest, Unavailable
from foldd.core.signatures import Identity, PublicIdentity
from foldd.core.wire import Ack, Chunk, Durable, Go, Have, Offer, Refuse, Wait
from foldd.daemon.bus.channel import Channel

_STALL_S = 15.0  # without an answer for so long over a connection that stands, offer again; long, for slow links


@dataclass(frozen=True)
class SubmitResult:
    """A file that the daemon has durably."""

    name: str  # in the daemon's inbox
    sha256: str
    size: int  # bytes
    sent: int  # bytes sent in this call, repetitions included; 0 where the daemon had the file already
    state: str  # "durable", or what the daemon knows of a file that it had: "folded", "queued", …


def submit_file(
    path: Path,
    endpoint: str,
    identity: Identity | None,
    server: PublicIdentity | None,
    *,
    timeout_s: float = 60.0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> SubmitResult:
    """Sends a file, resuming where an earlier attempt ended.

    Args:
        identity: the submitter's secret identity; None for plaintext on loopback.
        server: the daemon's public identity.
        timeout_s: give up after so long without progress.
        progress: called with (bytes that the daemon acknowledged, bytes in all).

    Raises:
        BadCheckpoint: `empty`, `too-large`, `no-file`, before anything is sent.
        BadSetup: `key-refused`, `plaintext-not-loopback`, `no-server-key`, `bad-endpoint`.
        BadRequest: the daemon's refusal, with its code.
        Unavailable: `bus-timeout`, or a refusal that may pass: `disk-full`, `too-many-partials`, ….
    """
    try:
        size = path.stat().st_size
        sha256 = sha256_file(path)
    except OSError as error:
        raise BadCheckpoint("no-file", f"{path} cannot be read: {error.strerror}.") from error
    if size == 0:
        raise BadCheckpoint("empty", f"{path} is empty.")
    if size > MAX_BUNDLE_BYTES:
        raise BadCheckpoint("too-large", f"{path} is {size} bytes, the limit is {MAX_BUNDLE_BYTES}.")
    with Channel(endpoint, identity, server) as channel, path.open("rb") as file:
        return _Sending(channel, Offer(path.name, size, sha256), timeout_s, progress).run(file.read, file.seek)


class _Sending:
    """One submission's state: how far was sent, how far acknowledged, when something last moved."""

    def __init__(self, channel: Channel, offer: Offer, timeout_s: float, progress: Callable[[int, int], None]) -> None:
        self._channel, self._offer, self._timeout, self._progress = channel, offer, timeout_s, progress
        self._position = self._acked = self._sent = 0
        self._go: Go | None = None
        self._pending: bytes | None = None  # read from the file, not yet taken by the socket
        self._moved = time.monotonic()

    def run(self, read: Callable[[int], bytes], seek: Callable[[int], int]) -> SubmitResult:
        due, connection = 0.0, self._channel.connections  # when to offer (again)
        while True:
            now = time.monotonic()
            if now - self._moved > self._timeout:
                raise self._timed_out()
            offered = self._channel.connections > 0
            if offered and (now >= due or self._channel.connections != connection):
                # After a new connection the daemon says where to go on.
                self._go, offered = None, self._channel.send(self._offer)
                if offered:
                    due, connection = now + _STALL_S, self._channel.connections
            self._send_chunks(read)
            answer = self._channel.receive(0.25 if offered and self._pending is None else 0.02)
            if answer is None:
                continue
            due = max(due, time.monotonic() + _STALL_S)
            match answer[0]:
                case Have() as reply if reply.sha256 == self._offer.sha256:
                    return self._result(self._offer.name, reply.state)
                case Durable() as reply if reply.sha256 == self._offer.sha256:
                    self._progress(self._offer.size, self._offer.size)
                    return self._result(reply.name, "durable")
                case Go() as reply if reply.sha256 == self._offer.sha256:
                    self._go, self._pending = reply, None
                    self._position = seek(reply.offset)
                    self._advance(reply.offset)
                case Ack() as reply if reply.sha256 == self._offer.sha256:
                    self._advance(reply.offset)
                case Wait() as reply if reply.sha256 == self._offer.sha256:
                    # Its word counts as progress: verifying gigabytes takes the daemon a while.
                    self._moved = time.monotonic()
                    self._go, due = None, self._moved + reply.seconds
                case Refuse(retry=True) as reply if reply.code in ("offer-first", "digest-mismatch"):
                    # The latter: what an earlier attempt left there was damaged, and is gone now.
                    self._go, due = None, time.monotonic() + 0.1
                case Refuse() as reply if reply.sha256 in ("", self._offer.sha256):
                    what = f"The daemon refused {self._offer.name}: {reply.what}"
                    raise Unavailable(reply.code, what) if reply.retry else BadRequest(reply.code, what)
                case _:
                    pass  # an answer to something that an earlier connection asked

    def _send_chunks(self, read: Callable[[int], bytes]) -> None:
        go = self._go
        while go is not None and self._position - self._acked < go.credit * go.chunk_bytes:
            if self._pending is None:
                self._pending = read(go.chunk_bytes) or None
            if self._pending is None:
                return
            if not self._channel.send(Chunk(self._offer.sha256, self._position), self._pending):
                return
            self._position += len(self._pending)
            self._sent += len(self._pending)
            self._pending = None

    def _advance(self, offset: int) -> None:
        if offset > self._acked:
            self._moved = time.monotonic()
        self._acked = offset
        self._progress(offset, self._offer.size)

    def _result(self, name: str, state: str) -> SubmitResult:
        return SubmitResult(name, self._offer.sha256, self._offer.size, self._sent, state)

    def _timed_out(self) -> Unavailable:
        return Unavailable(
            "bus-timeout",
            f"{self._channel.endpoint} did not take {self._offer.name}: nothing moved for {self._timeout:g} seconds.",
            why="no daemon listens there, the network is down, the server's public key that we were given is another "
            "one's, or the two sides do not both use encryption.",
            remedy="Check the endpoint and the keys; the same command goes on where this one ended.",
        )
