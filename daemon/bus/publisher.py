"""A checkpoint publisher: offers one bundle to the daemons that subscribe, and serves their pulls.

One ROUTER does both: a subscription is a message, so that there is one port to open and one allow-list to keep, and
daemons ask again every few seconds, so that nothing depends on one announcement.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import zmq

from foldd.core.digests import sha256_file
from foldd.core.errors import BadCheckpoint, BadRequest, Unavailable
from foldd.core.signatures import Identity
from foldd.core.wire import (
    CHUNK_BYTES,
    CREDIT,
    Announce,
    Declined,
    GetBundle,
    Refuse,
    Stored,
    Subscribe,
    decode_request,
)
from foldd.daemon.bus.auth import AllowList, Authenticator
from foldd.daemon.bus.desk import Answer, read_piece
from foldd.daemon.bus.sockets import Context, Socket, bind_socket, open_socket, reply_to, user_of

_DOMAIN = "foldd-publisher"
_TURN_MS = 250


@dataclass
class PublishResult:
    """Who has the bundle now: public keys (connections, where plaintext) → names."""

    sha256: str
    stored: dict[str, str] = field(default_factory=dict)
    declined: dict[str, str] = field(default_factory=dict)  # key → "name: code: what"


def publish_file(
    path: Path,
    endpoint: str,
    identity: Identity | None,
    daemons: AllowList | None,
    *,
    confirmations: int = 1,
    timeout_s: float = 600.0,
    bound: Callable[[str], None] = lambda endpoint: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> PublishResult:
    """Binds, announces a bundle and returns when `confirmations` daemons have it durably.

    Args:
        identity: the publisher's; None for plaintext on loopback.
        daemons: who may subscribe and pull; None for plaintext on loopback.
        timeout_s: give up after so long without a daemon that pulls or confirms.
        bound: told the endpoint with its real port.
        progress: called with (highest byte that was asked for, bytes in all).

    Raises:
        BadCheckpoint: `no-file`, `empty`.
        BadSetup: `cannot-bind`, `plaintext-not-loopback`.
        BadRequest: `declined`: so many daemons declined that the others on the allow-list are too few.
        Unavailable: `bus-timeout`, `authenticator-dead`.
    """
    try:
        size, sha256 = path.stat().st_size, sha256_file(path)
    except OSError as error:
        raise BadCheckpoint("no-file", f"{path} cannot be read: {error.strerror}.") from error
    if size == 0:
        raise BadCheckpoint("empty", f"{path} is empty.")
    daemons = (daemons or AllowList()) if identity is not None else None
    publication = _Publication(path, Announce(path.name, size, sha256, CHUNK_BYTES), daemons, progress)
    context: Context = zmq.Context()
    authenticator: Authenticator | None = None
    router = open_socket(context, zmq.ROUTER, max_data_bytes=0, window=4 * CREDIT + 32)
    try:
        router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        if daemons is not None:
            authenticator = Authenticator(context, {_DOMAIN: [daemons]})
            authenticator.start()
        bound(bind_socket(router, endpoint, identity, authenticator, _DOMAIN))
        while len(publication.result.stored) < confirmations:
            if authenticator is not None:
                authenticator.assert_alive()
            publication.check(confirmations, timeout_s)
            if router.poll(_TURN_MS):
                publication.serve(router)
        return publication.result
    finally:
        router.close()
        if authenticator is not None:
            authenticator.stop()
        context.destroy(linger=200)


class _Publication:
    """One bundle being offered."""

    def __init__(
        self, path: Path, offer: Announce, daemons: AllowList | None, progress: Callable[[int, int], None]
    ) -> None:
        self._path, self._offer, self._daemons, self._progress = path, offer, daemons, progress
        self._moved = time.monotonic()
        self.result = PublishResult(offer.sha256)

    def check(self, confirmations: int, timeout_s: float) -> None:
        """Raises what `publish_file` says when there is no point in going on."""
        declined = self.result.declined
        if self._daemons is not None and declined and len(self._daemons) - len(declined) < confirmations:
            raise BadRequest("declined", f"{self._offer.name} was declined by {'; '.join(declined.values())}")
        if time.monotonic() - self._moved > timeout_s:
            raise Unavailable(
                "bus-timeout",
                f"{len(self.result.stored)} of {confirmations} daemons took {self._offer.name}, "
                f"and nothing moved for {timeout_s:g} seconds.",
                why="no daemon has this publisher under `subscribe` in [bus], or its key is not in our folder.",
                remedy="Start it again: daemons go on where they were.",
            )

    def serve(self, router: Socket) -> None:
        frames = router.recv_multipart(copy=False)
        client = frames[0].bytes
        key = client.hex() if self._daemons is None else user_of(frames[-1])
        if len(frames) == 2 and (self._daemons is None or key in self._daemons):
            answer = self._answer(key, frames[1].bytes)
            if answer is not None:
                reply_to(router, client, *answer)

    def _answer(self, key: str, header: bytes) -> Answer | None:
        offer, name = self._offer, key if self._daemons is None else self._daemons.name(key)
        try:
            request = decode_request(header)
        except BadRequest as error:
            return Refuse("", error.code, error.what), None
        match request:
            case Subscribe():
                return offer, None
            case GetBundle(sha256=offer.sha256):
                self._moved = time.monotonic()
                self._progress(min(offer.size, request.offset + request.length), offer.size)
                try:
                    return read_piece(self._path, offer.sha256, request.offset, min(request.length, CHUNK_BYTES))
                except OSError as error:
                    return Refuse(offer.sha256, "bundle-gone", f"{error.strerror}", retry=True), None
            case Stored(sha256=offer.sha256):
                self.result.stored[key] = name
                self._moved = time.monotonic()
            case Declined(sha256=offer.sha256):
                self.result.declined[key] = f"{name}: {request.code}: {request.what}"
            case _:
                return Refuse("", "malformed", "This side does not answer such requests."), None
        return None
