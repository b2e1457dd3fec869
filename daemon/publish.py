"""Publishing: the bus where it is configured, and the ledger's mark that a generation was announced."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import msgspec

from foldd.core.errors import BadSetup
from foldd.core.signatures import Identity
from foldd.daemon.bus.desk import current_generation
from foldd.daemon.bus.puller import Puller
from foldd.daemon.bus.server import BusServer
from foldd.daemon.bus.settings import BusSettings
from foldd.daemon.config import Config
from foldd.daemon.crashpoints import crash_point
from foldd.daemon.layout import Layout
from foldd.daemon.ledger import Ledger

log = logging.getLogger("foldd.publish")


class Publishing:
    """The bus while the daemon runs, and the announcement of each committed generation."""

    def __init__(
        self, config: Config, identity: Identity, ledger: Ledger, submitted: Callable[[Path, str], None]
    ) -> None:
        self._ledger, self._layout = ledger, Layout(config.root)
        self._server: BusServer | None = None
        self._puller: Puller | None = None
        settings = _resolved(config)
        if settings.bind or settings.announce or settings.subscribe:
            self._server = BusServer(
                settings,
                None if settings.plaintext else identity,
                config.root,
                on_submitted=submitted,
                current=lambda: current_generation(config.root),
                known=self._known,
            )
        if settings.subscribe and self._server is not None:
            self._puller = Puller(settings, identity, self._server.incoming)

    def __enter__(self) -> Publishing:
        if self._server is not None:
            self._server.start()
            log.info("bus: requests on %s, announcements on %s", *self._endpoints(self._server))
        if self._puller is not None:
            self._puller.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._puller is not None:
            self._puller.stop()
        if self._server is not None:
            self._server.stop()

    def publish_pending(self) -> None:
        """Announces what was committed and not yet announced; devices that miss it get it when they ask."""
        pending = self._ledger.unpublished()
        if not pending:
            return
        if self._server is not None:
            self._server.announce()
        crash_point("publish.announced", self._layout.root)
        for generation in pending:
            self._ledger.mark_published(generation)
        crash_point("publish.marked", self._layout.root)

    def check(self) -> None:
        """A daemon that should be reachable and is not must not look healthy.

        Raises:
            BadSetup: `bus-failed`: the bus closed itself; systemd starts the daemon again.
        """
        if self._server is not None and not self._server.alive:
            raise BadSetup(
                "bus-failed",
                f"The bus closed itself: {self._server.failure}.",
                why="its authenticator or a socket failed; it never goes on without one.",
                remedy="Start the daemon again; if it happens again, look at the log.",
            ) from self._server.failure

    @staticmethod
    def _endpoints(server: BusServer) -> tuple[str, str]:
        return server.bind_endpoint or "(off)", server.announce_endpoint or "(off)"

    def _known(self, sha256: str) -> str | None:
        """Called from the bus' threads, to which the daemon's own connection does not belong."""
        ledger = Ledger(self._layout.ledger, read_only=True)
        try:
            arrival = ledger.arrival(sha256)
            return arrival.state if arrival else None
        finally:
            ledger.close()


def _resolved(config: Config) -> BusSettings:
    """The settings with paths that no longer depend on where the configuration lies."""
    bus = config.settings.bus
    paths = {
        name: str(config.resolve(getattr(bus, name)))
        for name in ("identity", "submitters", "devices")
        if getattr(bus, name)
    }
    publishers = tuple(
        msgspec.structs.replace(publisher, key=str(config.resolve(publisher.key)) if publisher.key else "")
        for publisher in bus.subscribe
    )
    return msgspec.structs.replace(bus, subscribe=publishers, **paths)
