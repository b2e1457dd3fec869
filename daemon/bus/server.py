"""The daemon's end of the bus: one thread with a ROUTER for requests and an XPUB for announcements.

Weights are only ever answered to a request. What is announced is the current signed manifest: to everybody when it
changes, and to whoever subscribes later (last-value cache). If anything goes wrong in a way that was not foreseen the
sockets are closed and `failure` says why: an unattended box is better deaf than open.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path

import zmq

from foldd.core.errors import BadSetup
from foldd.core.signatures import Identity
from foldd.core.wire import MANIFEST_TOPIC, Reply
from foldd.daemon.bus.auth import AllowList, Authenticator
from foldd.daemon.bus.desk import CurrentGeneration, Desk
from foldd.daemon.bus.incoming import Incoming
from foldd.daemon.bus.settings import BusSettings
from foldd.daemon.bus.sockets import bind_again, bind_socket, open_socket, reply_to, user_of

log = logging.getLogger("foldd.bus")

_TURN_MS = 250
_SWEEP_S = 60.0
_ANNOUNCE_SPACING_S = 0.2  # subscribers that come together share one sending: it goes to everybody each time
_REQUESTS, _ANNOUNCEMENTS = "foldd-requests", "foldd-announcements"  # ZAP domains


class BusServer:
    """Serves submissions and fetches from `start` to `stop` (once); `announce` may be called from any thread."""

    def __init__(
        self,
        settings: BusSettings,
        identity: Identity | None,
        root: Path,
        on_submitted: Callable[[Path, str], None],
        current: Callable[[], CurrentGeneration | None],
        *,
        known: Callable[[str], str | None] = lambda sha256: None,
        incoming: Incoming | None = None,
    ) -> None:
        """
        Args:
            identity: the daemon's secret identity; None only with `settings.plaintext`.
            root: the state directory.
            on_submitted: told each file that became durable in the inbox, and its sender (from another thread).
            current: what to publish now (called from the bus thread).
            known: what the ledger knows of a digest, or None (called from the bus thread).
            incoming: shared with a `Puller`; one of its own otherwise.

        Raises:
            BadSetup: `no-identity`, `no-allow-list`, `no-key`, `bad-key`.
        """
        if identity is None and not settings.plaintext:
            raise BadSetup(
                "no-identity",
                "The bus needs an identity.",
                why="`identity` in [bus] is empty.",
                remedy="Make one with `foldd keygen`, or set `plaintext = true` for endpoints on loopback.",
            )
        self._settings = settings
        self._identity = None if settings.plaintext else identity
        lists = [AllowList(Path(folder) if folder else None) for folder in (settings.submitters, settings.devices)]
        self._submitters, self._devices = lists
        self.incoming = incoming or Incoming(root, settings, on_submitted, known)
        plain = self._identity is None
        self._desk = Desk(settings, self.incoming, current, *((None, None) if plain else lists))
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._authenticator: Authenticator | None = None
        self._router: zmq.Socket[bytes] | None = None
        self._publisher: zmq.Socket[bytes] | None = None
        self._poller = zmq.Poller()
        self._wake = -1
        self._wake_lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._finisher: threading.Thread | None = None
        self._complete: queue.SimpleQueue[tuple[bytes, str] | None] = queue.SimpleQueue()
        self._finished: queue.SimpleQueue[tuple[bytes, Reply]] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._announce_asked = threading.Event()
        self._announced_at = -_ANNOUNCE_SPACING_S
        self.bind_endpoint = ""  # with the real port, once started
        self.announce_endpoint = ""
        self.failure: BaseException | None = None

    def start(self) -> None:
        """Binds and begins to serve; when it returns, clients can connect.

        Raises:
            BadSetup: `cannot-bind`, `plaintext-not-loopback`.
        """
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poller.register(self._wake, zmq.POLLIN)
        try:
            if self._identity is not None:
                domains = {_REQUESTS: [self._submitters, self._devices], _ANNOUNCEMENTS: [self._devices]}
                self._authenticator = Authenticator(self._context, domains)
                self._authenticator.start()
            self._open(bind_socket, self._settings.bind, self._settings.announce)
            self._warn_of_nobody()
        except BaseException:
            self._close()
            raise
        self._finisher = threading.Thread(target=self._finish_transfers, name="foldd-bus-finisher", daemon=True)
        self._finisher.start()
        self._thread = threading.Thread(target=self._run, name="foldd-bus", daemon=True)
        self._thread.start()

    def announce(self) -> None:
        """Tells subscribers that the current generation changed."""
        self._announce_asked.set()
        self._wake_up()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Closes the sockets; transfers under way go on after the next start."""
        self._stopping.set()
        self._wake_up()
        if self._thread is not None:
            self._thread.join(timeout_s)
        if self._finisher is not None:
            self._finisher.join(timeout_s)

    @property
    def alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def counts(self) -> dict[str, int]:
        """Counters since the start, for metrics."""
        rejected = self._authenticator.rejections if self._authenticator is not None else 0
        return {**self._desk.counts, "rejected": rejected}

    def _wake_up(self) -> None:
        with self._wake_lock:  # once closed, the number may be another file's
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    def _open(self, bind: Callable[..., str], requests: str, announcements: str) -> None:
        settings, window = self._settings, 4 * self._settings.credit + 32
        if requests:
            self._router = open_socket(self._context, zmq.ROUTER, max_data_bytes=settings.chunk_bytes, window=window)
            self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)  # an answer to nobody is an error that we see
            self.bind_endpoint = bind(self._router, requests, self._identity, self._authenticator, _REQUESTS)
            self._poller.register(self._router, zmq.POLLIN)
        if announcements:
            # Only the latest manifest matters: a slow subscriber needs no queue.
            self._publisher = open_socket(self._context, zmq.XPUB, max_data_bytes=1024, window=4)
            self._publisher.setsockopt(zmq.XPUB_VERBOSE, 1)  # told of every subscriber, not only of the first
            self.announce_endpoint = bind(
                self._publisher, announcements, self._identity, self._authenticator, _ANNOUNCEMENTS
            )
            self._poller.register(self._publisher, zmq.POLLIN)

    def _warn_of_nobody(self) -> None:
        if self._identity is not None and self._settings.bind and not len(self._submitters) and not len(self._devices):
            log.warning(
                "%s admits nobody: no key is in the folders that `submitters` and `devices` in [bus] name; copy .pub "
                "files there",
                self.bind_endpoint,
            )

    def _close_sockets(self) -> None:
        for socket in (self._router, self._publisher):
            if socket is not None and not socket.closed:
                if socket in self._poller:
                    self._poller.unregister(socket)
                socket.close(linger=0)
        self._router = self._publisher = None

    def _close(self) -> None:
        self._close_sockets()
        if self._authenticator is not None:
            self._authenticator.stop()
        self._complete.put(None)
        self._context.destroy(linger=0)
        with self._wake_lock:
            os.close(self._wake)
            self._wake = -1

    def _run(self) -> None:
        looked = swept = time.monotonic()
        try:
            while not self._stopping.is_set():
                if self._authenticator is not None:
                    self._authenticator.assert_alive()
                ready = dict(self._poller.poll(_TURN_MS))
                if self._wake in ready:
                    os.eventfd_read(self._wake)
                if self._router in ready:
                    self._serve_requests()
                if self._publisher in ready:
                    self._serve_subscriptions()
                self._send_finished()
                now = time.monotonic()
                if self._announce_asked.is_set() and now - self._announced_at >= _ANNOUNCE_SPACING_S:
                    self._send_announcement(now)
                if now - looked >= self._settings.allow_list_poll_s:
                    looked = now
                    self._look_at_allow_lists()
                if now - swept >= _SWEEP_S:
                    swept = now
                    with contextlib.suppress(OSError):  # not worth the bus; the next sweep sees it again
                        self.incoming.sweep()
        except BaseException as error:
            self.failure = error
            log.exception("the bus is closed")
            if not isinstance(error, Exception):
                raise
        finally:
            self._close()

    def _serve_requests(self) -> None:
        router = self._router
        for _ in range(64):  # then the other duties get their turn
            if router is None:
                return
            try:
                frames = router.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            client = frames[0].bytes
            if not 2 <= len(frames) <= 3:
                self._desk.counts["malformed"] += 1
                continue
            key = "" if self._identity is None else user_of(frames[1])
            payload = frames[2].buffer if len(frames) == 3 else None
            reply, data = self._desk.answer(key, frames[1].bytes, payload)
            reply_to(router, client, reply, data)
            sha256 = getattr(reply, "sha256", "")
            if sha256 and self.incoming.is_complete(sha256):
                self._complete.put((client, sha256))

    def _finish_transfers(self) -> None:
        """The finisher's thread: hashing and syncing gigabytes must not keep the bus from answering."""
        while (item := self._complete.get()) is not None:
            client, sha256 = item
            self._finished.put((client, self.incoming.finish(sha256)))
            self._wake_up()

    def _send_finished(self) -> None:
        while not self._finished.empty():
            client, reply = self._finished.get()
            if self._router is not None:
                reply_to(self._router, client, reply, None)

    def _serve_subscriptions(self) -> None:
        while self._publisher is not None:
            try:
                frames = self._publisher.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if frames[0][:1] == b"\x01" and MANIFEST_TOPIC.startswith(frames[0][1:]):
                self._announce_asked.set()

    def _send_announcement(self, now: float) -> None:
        self._announce_asked.clear()
        self._announced_at = now
        current = self._desk.published()
        if current is not None and self._publisher is not None:
            self._publisher.send_multipart([MANIFEST_TOPIC, current.manifest])

    def _look_at_allow_lists(self) -> None:
        if self._identity is None:
            return
        gone = self._submitters.reload() | self._devices.reload()
        if gone:
            # libzmq asks ZAP once per connection: a revoked key's session ends only with its socket. The others
            # connect again and go on where they were.
            log.warning("%d keys were revoked: dropping all connections", len(gone))
            requests, announcements = self.bind_endpoint, self.announce_endpoint
            self._close_sockets()
            self._open(bind_again, requests if self._settings.bind else "", announcements)
