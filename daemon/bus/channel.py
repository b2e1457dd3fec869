"""A client's connection: a DEALER that knows whom it talks to, and notices when it is not wanted."""

from __future__ import annotations

import struct
import time

import zmq

from foldd.core.errors import BadSetup
from foldd.core.signatures import Identity, PublicIdentity
from foldd.core.wire import CREDIT, MAX_CHUNK_BYTES, Reply, Request, check_endpoint, decode_reply, encode
from foldd.daemon.bus.sockets import check_plaintext, open_socket

_REFUSALS = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
_EVENTS = _REFUSALS | zmq.EVENT_HANDSHAKE_SUCCEEDED


class Channel:
    """One connection; libzmq connects again by itself."""

    def __init__(self, endpoint: str, identity: Identity | None, server: PublicIdentity | None) -> None:
        """
        Args:
            identity: ours; None for plaintext, on loopback only.
            server: theirs, pinned: nobody else can answer.

        Raises:
            BadSetup: `plaintext-not-loopback`, `no-server-key`, `bad-endpoint`.
        """
        self.endpoint = endpoint
        self.connections = 0  # made so far; what was under way when it rises is lost and must be asked for again
        check_endpoint(endpoint)
        if identity is None:
            check_plaintext(endpoint)
        elif server is None:
            raise BadSetup("no-server-key", f"The public key of {endpoint} is needed.", remedy="Give its .pub file.")
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = open_socket(self._context, zmq.DEALER, max_data_bytes=MAX_CHUNK_BYTES, window=4 * CREDIT)
        self._socket.setsockopt(zmq.IMMEDIATE, 1)  # nothing is queued for a peer that is not there
        self._socket.setsockopt(zmq.RECONNECT_IVL, 100)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 5_000)
        if identity is not None and server is not None:
            self._socket.curve_serverkey = bytes.fromhex(server.curve_public)
            self._socket.curve_publickey = bytes.fromhex(identity.public.curve_public)
            self._socket.curve_secretkey = bytes.fromhex(identity.curve_secret)
        self._monitor = self._socket.get_monitor_socket(_EVENTS)
        try:
            self._socket.connect(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise BadSetup(
                "bad-endpoint", f"{endpoint} is no endpoint: {error.strerror}.", remedy="Write tcp://host:port."
            ) from error

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.disable_monitor()
        self._context.destroy(linger=200)

    def send(self, request: Request, data: bytes | memoryview | None = None) -> bool:
        """Hands a message over; False where there is no connection, or no room, now."""
        frames: list[bytes | memoryview] = [encode(request)] if data is None else [encode(request), data]
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def receive(self, timeout_s: float) -> tuple[Reply, bytes] | None:
        """The next reply and its data; None when none came in time.

        Raises:
            BadSetup: `key-refused`: the other side does not admit our key, or is not who we think.
            BadRequest: `malformed`.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            left = max(0.0, deadline - time.monotonic())
            while self._monitor.poll(0):
                self._read_event()
            if self._socket.poll(min(int(left * 1000) + 1, 100)):
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
                return decode_reply(frames[0]), frames[1] if len(frames) > 1 else b""
            if left == 0.0:
                return None

    def _read_event(self) -> None:
        event = struct.unpack("=HI", self._monitor.recv_multipart()[0])[0]
        if event & zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self.connections += 1
        elif event & _REFUSALS:
            raise BadSetup(
                "key-refused",
                f"{self.endpoint} refused the connection.",
                why="our key is not on its allow-list, or the server's key that we were given is another one's.",
                remedy="Copy our .pub file into the daemon's allow-list folder, and check the server's .pub file here.",
            )
