"""Opening sockets so that nothing can be bound or connected unprotected by mistake."""

from __future__ import annotations

import time

import zmq

from foldd.core.errors import BadSetup, Unavailable
from foldd.core.signatures import Identity
from foldd.core.wire import MAX_HEADER_BYTES, Reply, check_endpoint, encode, is_local
from foldd.daemon.bus.auth import Authenticator

Socket = zmq.Socket[bytes]
Context = zmq.Context[zmq.Socket[bytes]]

HEARTBEAT_MS = 5_000  # a peer that is gone without a word (power, radio) is noticed within three of these
LINGER_MS = 500  # at most so long does closing wait for unsent messages
_CURVE_BYTES = 256  # what encryption adds to a frame (33) counts too: without room a full chunk ends the connection
_ZAP_ENFORCE_DOMAIN = 93  # in libzmq 4.3, but pyzmq names it for draft builds only
_REBIND_S = 5.0


def check_plaintext(endpoint: str) -> None:
    """
    Raises:
        BadSetup: `plaintext-not-loopback`.
    """
    if not is_local(endpoint):
        raise BadSetup(
            "plaintext-not-loopback",
            f"{endpoint} would be open without encryption or authentication.",
            why="no identity is given, or `plaintext` is set, and the endpoint is reachable from other machines.",
            remedy="Make keys with `foldd keygen` and name them, or use a 127.0.0.1 endpoint.",
        )


def open_socket(context: Context, kind: int, *, max_data_bytes: int, window: int) -> Socket:
    """A socket with heartbeats, bounded linger and bounded queues of `window` messages for each peer."""
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, LINGER_MS)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 2 * HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TTL, 3 * HEARTBEAT_MS)
    socket.setsockopt(zmq.MAXMSGSIZE, max(max_data_bytes, MAX_HEADER_BYTES) + _CURVE_BYTES)
    # Both ends pace themselves by credit; more than this in a queue is a peer that does not.
    socket.setsockopt(zmq.SNDHWM, window)
    socket.setsockopt(zmq.RCVHWM, window)
    return socket


def bind_socket(
    socket: Socket,
    endpoint: str,
    identity: Identity | None,
    authenticator: Authenticator | None,
    domain: str,
) -> str:
    """Protects a socket, then binds it; the endpoint with its real port.

    The order is the point: with `curve_server` set after the bind, libzmq takes plaintext clients.

    Raises:
        BadSetup: `bad-endpoint`, `plaintext-not-loopback`, `cannot-bind`.
        Unavailable: `authenticator-dead`.
    """
    check_endpoint(endpoint, bind=True)
    if identity is None:
        check_plaintext(endpoint)
    else:
        if authenticator is None:
            raise Unavailable("authenticator-dead", f"{endpoint} is not bound: there is no authenticator.")
        authenticator.assert_alive()
        socket.setsockopt(zmq.ZAP_DOMAIN, domain.encode())
        socket.setsockopt(_ZAP_ENFORCE_DOMAIN, 1)
        socket.curve_secretkey = bytes.fromhex(identity.curve_secret)
        socket.curve_publickey = bytes.fromhex(identity.public.curve_public)
        socket.curve_server = True
    try:
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        raise BadSetup(
            "cannot-bind",
            f"{endpoint} cannot be bound: {error.strerror}.",
            why="another process has the port, or the address is not this machine's.",
            remedy="Stop the other process, or change the endpoint in config.toml.",
        ) from error
    return bytes(socket.getsockopt(zmq.LAST_ENDPOINT)).rstrip(b"\0").decode()


def user_of(frame: zmq.Frame) -> str:
    """The public key (hexadecimal) that CURVE proved and ZAP admitted; "-" for a frame that has none."""
    try:
        return str(frame.get("User-Id"))
    except zmq.ZMQError:
        return "-"


def reply_to(router: Socket, client: bytes, reply: Reply, data: bytes | None) -> None:
    """Sends a reply, or drops it: a client that is gone or reads nothing asks again when it wants an answer."""
    try:
        router.send_multipart([client, encode(reply), *([] if data is None else [data])], zmq.NOBLOCK)
    except zmq.ZMQError as error:
        if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
            raise


def bind_again(
    socket: Socket,
    endpoint: str,
    identity: Identity | None,
    authenticator: Authenticator | None,
    domain: str,
) -> str:
    """Binds where a socket was closed a moment ago; libzmq lets go of the port a little later than it says.

    Raises:
        BadSetup: `cannot-bind` after five seconds.
    """
    deadline = time.monotonic() + _REBIND_S
    while True:
        try:
            return bind_socket(socket, endpoint, identity, authenticator, domain)
        except BadSetup:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
