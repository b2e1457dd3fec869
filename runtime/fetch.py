"""Fetching generations into the store: ask or be told, verify, pull in pieces, commit. No onnxruntime here."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from foldd.core.errors import BadManifest, BadRequest, BadSetup, Unavailable
from foldd.core.manifest import Manifest
from foldd.core.signatures import Identity, PublicIdentity
from foldd.core.window import PullWindow
from foldd.core.wire import CHUNK_BYTES, Data, GetArtifact, GetManifest, ManifestIs, Refuse
from foldd.runtime.channel import Channel
from foldd.runtime.store import Store

log = logging.getLogger("foldd.runtime")

_STALL_S = 15.0  # ask again for what did not come over a connection that stands; long, for slow links


@dataclass(frozen=True)
class Source:
    """Where a device gets its generations from."""

    endpoint: str  # the daemon's `bind`
    identity: Identity | None = None  # the device's; None for plaintext on loopback
    server: PublicIdentity | None = None  # the daemon's, for encryption
    announcements: str | None = None  # the daemon's `announce`; without it the daemon is asked every `ask_s`
    ask_s: float = 5.0  # seconds between questions where nothing announces
    resync_s: float = 60.0  # seconds between questions where announcements come: they may be lost
    timeout_s: float = 30.0  # give up a transfer after so long without a byte; it is resumed later


class Fetcher:
    """Brings the daemon's current generation into a store. One thread at a time."""

    def __init__(
        self, source: Source, store: Store, *, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> None:
        """
        Args:
            progress: called with (bytes here, bytes in all) while an artifact comes.

        Raises:
            BadSetup: `plaintext-not-loopback`, `no-server-key`, `bad-endpoint`.
        """
        self._source, self.store, self._progress = source, store, progress
        self._channel: Channel | None = self._connect()
        self._chunk_bytes = CHUNK_BYTES
        self._stall_s = min(_STALL_S, source.timeout_s / 3)
        self._asked = float("-inf")
        self.stopping = threading.Event()  # set it from anywhere to end a transfer; it is resumed at the next start

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def poll(self, timeout_s: float) -> Manifest | None:
        """Waits up to `timeout_s` for news (a transfer may take longer); the generation that was fetched, if any.

        Raises:
            BadManifest: what came must not be trusted; the code says why. The store is as it was.
            BadSetup: `key-refused`.
            BadRequest: a refusal of the daemon.
            Unavailable: `bus-timeout`, `no-generation`, `disk-full`, `disk-failed`.
        """
        if self._channel is None:
            self._channel = self._connect()
        try:
            data = self._news(self._channel, timeout_s)
            return None if data is None else self._accept(self._channel, data)
        except (BadSetup, Unavailable):
            self.close()  # a refused connection does not come back by itself
            raise

    def fetch(self) -> Manifest:
        """Asks now, and brings the store up to date; the manifest that is current then. Raises as `poll`."""
        if self._channel is None:
            self._channel = self._connect()
        try:
            fetched = self._accept(self._channel, self._ask(self._channel, self._source.timeout_s))
        except (BadSetup, Unavailable):
            self.close()
            raise
        manifest = fetched or self.store.current()
        assert manifest is not None
        return manifest

    def _connect(self) -> Channel:
        source = self._source
        self._asked = float("-inf")
        return Channel(source.endpoint, source.identity, source.server, source.announcements)

    def _news(self, channel: Channel, timeout_s: float) -> bytes | None:
        source, deadline = self._source, time.monotonic() + timeout_s
        pause = source.resync_s if source.announcements else source.ask_s
        while True:
            now = time.monotonic()
            if now - self._asked >= pause:
                try:
                    return self._ask(channel, source.timeout_s)
                except Unavailable as error:
                    if error.code != "no-generation":
                        raise
                self._asked = now  # a daemon that has nothing yet
            left = min(deadline - now, self._asked + pause - now)
            if source.announcements:
                if (data := channel.announced(max(0.0, left))) is not None:
                    return data
            elif left > 0:
                channel.receive(left)  # nothing is due; late pieces of an earlier transfer are dropped here
            if time.monotonic() >= deadline:
                return None

    def _ask(self, channel: Channel, timeout_s: float) -> bytes:
        deadline = time.monotonic() + timeout_s
        asked, connection = float("-inf"), 0
        while (now := time.monotonic()) < deadline:
            self._check_stop()
            due = channel.connections != connection or (channel.connections > 0 and now - asked >= self._stall_s)
            if due and channel.send(GetManifest()):
                asked, connection = now, channel.connections
            match channel.receive(min(0.05, deadline - now)):
                case (ManifestIs() as reply, data):
                    self._asked, self._chunk_bytes = now, min(CHUNK_BYTES, reply.chunk_bytes)
                    return data
                case (Refuse(sha256="") as refusal, _):
                    self._asked = now
                    what = f"{channel.endpoint} refused: {refusal.what}"
                    raise Unavailable(refusal.code, what) if refusal.retry else BadRequest(refusal.code, what)
        raise Unavailable(
            "bus-timeout",
            f"{channel.endpoint} did not answer within {timeout_s:g} seconds.",
            why="no daemon listens there, the network is down, the first --trust key is another daemon's, or the two "
            "sides do not both use encryption.",
            remedy="Check the endpoint and the keys.",
        )

    def _check_stop(self) -> None:
        if self.stopping.is_set():
            raise Unavailable("stopped", "Fetching was told to stop.")

    def _accept(self, channel: Channel, data: bytes) -> Manifest | None:
        manifest = self.store.admit(data)
        if manifest is None:
            return None
        log.info("fetching generation %d (%d bytes)", manifest.generation, manifest.artifact.bytes)
        try:
            self._pull(channel, manifest)
            self.store.commit(manifest, data)
        except OSError as error:
            raise Unavailable("disk-failed", f"The store failed: {error}.") from error
        return manifest

    def _pull(self, channel: Channel, manifest: Manifest) -> None:
        sha256, size = manifest.artifact.sha256, manifest.artifact.bytes
        window = PullWindow(size, self.store.begin(manifest), self._chunk_bytes)
        moved = asked = time.monotonic()
        connection = channel.connections
        while not window.complete:
            self._check_stop()
            for offset, length in window.wanted():
                channel.send(GetArtifact(sha256, offset, length))
            answer = channel.receive(0.2)
            now = time.monotonic()
            match answer:
                case (Data(sha256=about, total=total), _) if about == sha256 and total != size:
                    raise BadManifest("artifact-size", f"{channel.endpoint} has {total} bytes, {size} were signed.")
                case (Data(sha256=about) as piece, data) if about == sha256 and window.accept(piece.offset, len(data)):
                    self.store.write(manifest, piece.offset, data)
                    self._progress(window.done, size)
                    moved = asked = now
                case (Refuse(sha256=about) as refusal, _) if about == sha256:
                    what = f"{channel.endpoint} refused the artifact: {refusal.what}"
                    raise Unavailable(refusal.code, what) if refusal.retry else BadRequest(refusal.code, what)
                case _ if now - moved > self._source.timeout_s:
                    raise Unavailable(
                        "bus-timeout",
                        f"{channel.endpoint} stopped sending at {window.done} of {size} bytes.",
                        remedy="The transfer goes on from there at the next attempt.",
                    )
                case _ if now - asked > self._stall_s or channel.connections != connection:
                    window.restart()
                    asked, connection = now, channel.connections
