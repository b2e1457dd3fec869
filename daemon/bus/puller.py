"""The daemon's side of publishers: one thread for each, which asks what it has and pulls it into the inbox."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

from foldd.core.errors import BadRequest, BadSetup, FolddError, Unavailable
from foldd.core.signatures import Identity, PublicIdentity, read_public
from foldd.core.window import PullWindow
from foldd.core.wire import (
    Ack,
    Announce,
    Data,
    Declined,
    Durable,
    GetBundle,
    Go,
    Have,
    Refuse,
    Stored,
    Subscribe,
    Wait,
)  # fmt: skip
from foldd.daemon.bus.channel import Channel
from foldd.daemon.bus.incoming import Incoming
from foldd.daemon.bus.settings import BusSettings, PublisherSettings

log = logging.getLogger("foldd.bus")

_STALL_S = 15.0  # ask again for pieces that did not come over a connection that stands; long, for slow links
_GIVE_UP_S = 60.0  # without a piece for so long: begin anew with a fresh connection, from where the file ends
_RETRY_S = 5.0
_MISMATCH_S = 600.0  # pause before a bundle is pulled again that came complete, from this publisher alone, and wrong
_TURN_S = 0.25


class Puller:
    """Follows every publisher of the settings while it is started."""

    def __init__(self, settings: BusSettings, identity: Identity | None, incoming: Incoming) -> None:
        """
        Args:
            incoming: the server's (`BusServer.incoming`), so that both know of each other's transfers.

        Raises:
            BadSetup: `no-identity`, `no-server-key`, `no-key`, `bad-key`, `plaintext-not-loopback`.
        """
        self._stopping = threading.Event()
        identity = None if settings.plaintext else identity
        if settings.subscribe and identity is None and not settings.plaintext:
            raise BadSetup(
                "no-identity", "Following publishers needs an identity.", remedy="Make one with `foldd keygen`."
            )
        self._feeds = [
            _Feed(publisher, settings, identity, incoming, self._stopping) for publisher in settings.subscribe
        ]

    def start(self) -> None:
        for feed in self._feeds:
            feed.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Ends within a turn of the loop, unless a file is just being verified."""
        self._stopping.set()
        deadline = time.monotonic() + timeout_s
        for feed in self._feeds:
            if feed.is_alive():
                feed.join(max(0.0, deadline - time.monotonic()))

    @property
    def errors(self) -> dict[str, str]:
        """Endpoint → what is wrong with it now."""
        return {feed.endpoint: feed.error for feed in self._feeds if feed.error}


class _Feed(threading.Thread):
    """One publisher."""

    def __init__(
        self,
        publisher: PublisherSettings,
        settings: BusSettings,
        identity: Identity | None,
        incoming: Incoming,
        stopping: threading.Event,
    ) -> None:
        super().__init__(name=f"foldd-pull {publisher.endpoint}", daemon=True)
        self.endpoint, self.error = publisher.endpoint, ""
        self._settings, self._identity, self._incoming, self._stopping = settings, identity, incoming, stopping
        self._server: PublicIdentity | None = read_public(Path(publisher.key)) if publisher.key else None
        self._owner = f"publisher:{publisher.endpoint}"
        self._told: dict[str, Stored | Declined] = {}  # what became of a digest, to say again when it is announced
        self._paused: dict[str, tuple[float, Declined]] = {}  # digest → monotonic seconds when it may be pulled again
        Channel(self.endpoint, identity, self._server).close()  # a mistake in the settings is the operator's to see now

    def run(self) -> None:
        while not self._stopping.is_set():
            try:
                with Channel(self.endpoint, self._identity, self._server) as channel:
                    self._follow(channel)
            except FolddError as error:
                if self.error != error.what:
                    log.warning("publisher %s: %s", self.endpoint, error)
                self.error = error.what
            except Exception as error:
                log.exception("publisher %s", self.endpoint)
                self.error = str(error)
            self._stopping.wait(_RETRY_S)

    def _follow(self, channel: Channel) -> None:
        asked = float("-inf")
        while not self._stopping.is_set():
            if time.monotonic() - asked >= self._settings.subscribe_poll_s and channel.send(Subscribe()):
                asked = time.monotonic()
            answer = channel.receive(_TURN_S if channel.connections else 0.05)
            if answer is not None and isinstance(answer[0], Announce):
                self._take(channel, answer[0])
                self.error = self._paused[answer[0].sha256][1].what if answer[0].sha256 in self._paused else ""

    def _take(self, channel: Channel, announce: Announce) -> None:
        sha256 = announce.sha256
        if sha256 in self._told:
            channel.send(self._told[sha256])
            return
        self._paused = {key: pause for key, pause in self._paused.items() if pause[0] > time.monotonic()}
        if sha256 in self._paused:
            channel.send(self._paused[sha256][1])
            return
        match self._incoming.offer(announce.name, announce.size, sha256, self._owner):
            case Have():
                self._tell(channel, Stored(sha256))
            case Wait():
                pass  # it is announced again
            case Refuse(retry=True) as refusal:
                raise Unavailable(refusal.code, refusal.what)
            case Refuse() as refusal:
                self._tell(channel, Declined(sha256, refusal.code, refusal.what))
            case Go() as go:
                log.info("pulling %s (%d bytes) from %s", announce.name, announce.size, self.endpoint)
                self._pull(channel, announce, go)
                if self._incoming.is_complete(sha256):
                    outcome = self._incoming.finish(sha256)
                    if isinstance(outcome, Durable):
                        self._tell(channel, Stored(sha256))
                    elif outcome.retry:
                        raise Unavailable(outcome.code, outcome.what)
                    else:  # a mismatch: said, but not for good, because the next attempt may bring the right bytes
                        log.warning("publisher %s: %s", self.endpoint, outcome.what)
                        declined = Declined(sha256, outcome.code, outcome.what)
                        self._paused[sha256] = (time.monotonic() + _MISMATCH_S, declined)
                        channel.send(declined)

    def _tell(self, channel: Channel, what: Stored | Declined) -> None:
        self._told[what.sha256] = what
        while len(self._told) > 256:
            del self._told[next(iter(self._told))]
        channel.send(what)

    def _pull(self, channel: Channel, announce: Announce, go: Go) -> None:
        chunk = min(announce.chunk_bytes, go.chunk_bytes)
        window = PullWindow(announce.size, go.offset, chunk, go.credit)
        moved = asked = time.monotonic()
        connection = channel.connections
        while not window.complete and not self._stopping.is_set():
            for offset, length in window.wanted():
                channel.send(GetBundle(announce.sha256, offset, length))
            answer = channel.receive(_TURN_S)
            now = time.monotonic()
            match answer:
                case (Data(sha256=announce.sha256) as piece, data) if window.accept(piece.offset, len(data)):
                    outcome = self._incoming.write(announce.sha256, piece.offset, data, self._owner)
                    if not isinstance(outcome, Ack):
                        raise Unavailable("pull-failed", f"{announce.name}: {getattr(outcome, 'what', 'out of step')}")
                    moved = asked = now
                case (Refuse() as refusal, _):
                    raise BadRequest(refusal.code, refusal.what)
                case _ if now - moved > _GIVE_UP_S:
                    raise Unavailable("bus-timeout", f"{self.endpoint} stopped sending {announce.name}.")
                case _ if now - asked > _STALL_S or channel.connections != connection:
                    window.restart()
                    asked, connection = now, channel.connections
