"""The device's connections to its daemon: requests on a DEALER, announcements on a SUB.

The daemon has a sibling of this (daemon/bus/channel.py): the two rooms may not import each other, and core has no
sockets. What is said is shared: foldd.core.wire.
"""

from __future__ import annotations

import struct
import time

import zmq

from foldd.core.errors import BadSetup
from foldd.core.manifest import MAX_MANIFEST_BYTES
from foldd.core.signatures import Identity, PublicIdentity
from foldd.core.wire import (
    CREDIT,
    MANIFEST_TOPIC,
    MAX_CHUNK_BYTES,
    Reply,
    Request,
    check_endpoint,
    decode_reply,
    encode,
    is_local,
)

HEARTBEAT_MS = 5_000  # a daemon that is gone without a word is noticed within three of these
_CURVE_BYTES = 256  # what encryption adds to a frame (33) counts too
_REFUSALS = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
_EVENTS = _REFUSALS | zmq.EVENT_HANDSHAKE_SUCCEEDED


class Channel:
    """Both connections; libzmq connects again by itself."""

    def __init__(
        self,
        endpoint: str,
        identity: Identity | None,
        server: PublicIdentity | None,
        announcements: str | None = None,
    ) -> None:
        """
        Args:
            identity: the device's; None for plaintext, on loopback only.
            server: the daemon's public identity, pinned.
            announcements: endpoint of the daemon's announcements, where it has one.

        Raises:
            BadSetup: `plaintext-not-loopback`, `no-server-key`, `bad-endpoint`.
        """
        self.endpoint = endpoint
        self.connections = 0  # made so far; what was under way when it rises is lost and must be asked for again
        for address in filter(None, (endpoint, announcements)):
            check_endpoint(address)
            if identity is None and not is_local(address):
                raise BadSetup(
                    "plaintext-not-loopback",
                    f"{address} would be spoken to without encryption or authentication.",
                    why="no identity is given, and the endpoint is on another machine.",
                    remedy="Make a key with `foldd keygen` and give it with --identity.",
                )
        if identity is not None and server is None:
            raise BadSetup("no-server-key", f"The public key of {endpoint} is needed.", remedy="Give its .pub file.")
        self._identity, self._server = identity, server
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._dealer = self._socket(zmq.DEALER)
        self._dealer.setsockopt(zmq.IMMEDIATE, 1)  # nothing is queued for a peer that is not there
        # A refused connection is not tried again by libzmq, so that both must be watched.
        self._monitors = [self._dealer.get_monitor_socket(_EVENTS)]
        self._subscriber: zmq.Socket[bytes] | None = None
        try:
            self._dealer.connect(endpoint)
            if announcements:
                self._subscriber = self._socket(zmq.SUB)
                self._subscriber.setsockopt(zmq.SUBSCRIBE, MANIFEST_TOPIC)
                self._monitors.append(self._subscriber.get_monitor_socket(_REFUSALS))
                self._subscriber.connect(announcements)
        except zmq.ZMQError as error:
            self.close()
            raise BadSetup(
                "bad-endpoint", f"{endpoint} is no endpoint: {error.strerror}.", remedy="Write tcp://host:port."
            ) from error

    def close(self) -> None:
        for socket in filter(None, (self._dealer, self._subscriber)):
            socket.disable_monitor()
        self._context.destroy(linger=200)

    def send(self, request: Request) -> bool:
        """Hands a request over; False where there is no connection, or no room, now."""
        try:
            self._dealer.send(encode(request), zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def receive(self, timeout_s: float) -> tuple[Reply, bytes] | None:
        """The next reply and its data; None when none came in time.

        Raises:
            BadSetup: `key-refused`.
            BadRequest: `malformed`.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            left = max(0.0, deadline - time.monotonic())
            self._read_events()
            if self._dealer.poll(min(int(left * 1000) + 1, 100)):
                frames = self._dealer.recv_multipart(zmq.NOBLOCK)
                return decode_reply(frames[0]), frames[1] if len(frames) > 1 else b""
            if left == 0.0:
                return None

    def announced(self, timeout_s: float) -> bytes | None:
        """The latest manifest that was announced since the last call, waiting for one if there is none yet.

        Raises:
            BadSetup: `key-refused`.
        """
        self._read_events()
        if self._subscriber is None or not self._subscriber.poll(int(timeout_s * 1000)):
            return None
        latest = None
        try:
            while True:
                frames = self._subscriber.recv_multipart(zmq.NOBLOCK)
                if len(frames) == 2:
                    latest = frames[1]
        except zmq.Again:
            return latest

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.LINGER, 200)
        socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 2 * HEARTBEAT_MS)
        socket.setsockopt(zmq.HEARTBEAT_TTL, 3 * HEARTBEAT_MS)
        socket.setsockopt(zmq.RECONNECT_IVL, 100)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 5_000)
        socket.setsockopt(zmq.MAXMSGSIZE, max(MAX_CHUNK_BYTES, MAX_MANIFEST_BYTES) + _CURVE_BYTES)
        socket.setsockopt(zmq.RCVHWM, 4 * CREDIT)
        socket.setsockopt(zmq.SNDHWM, 4 * CREDIT)
        if self._identity is not None and self._server is not None:
            socket.curve_serverkey = bytes.fromhex(self._server.curve_public)
            socket.curve_publickey = bytes.fromhex(self._identity.public.curve_public)
            socket.curve_secretkey = bytes.fromhex(self._identity.curve_secret)
        return socket

    def _read_events(self) -> None:
        for monitor in self._monitors:
            while monitor.poll(0):
                event = struct.unpack("=HI", monitor.recv_multipart()[0])[0]
                if event & zmq.EVENT_HANDSHAKE_SUCCEEDED:
                    self.connections += 1
                elif event & _REFUSALS:
                    raise BadSetup(
                        "key-refused",
                        f"{self.endpoint} refused the connection.",
                        why="this device's key is not on its allow-list, or the daemon's key here is another one's.",
                        remedy="Copy this device's .pub file into the daemon's `devices` folder, and check --trust.",
                    )
