"""The supervisor: `foldd run`. Watches, keeps the ledger, starts the worker, commits, publishes. Never torch.

One thread decides everything; other threads (file events, the bus) only wake it. Its loop: take in what has
settled, give the worker the next checkpoint, hear what it says, look after its limits, say how things stand.
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
import sqlite3
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from foldd.core.base_spec import read_base_spec
from foldd.core.errors import Unavailable
from foldd.core.notify import notify, watchdog_interval_s
from foldd.daemon.base_folder import restore_base
from foldd.daemon.commit import Committer
from foldd.daemon.config import Config
from foldd.daemon.foreman import Foreman
from foldd.daemon.intake import Intake
from foldd.daemon.keys import daemon_identity
from foldd.daemon.layout import Layout
from foldd.daemon.ledger import Ledger
from foldd.daemon.live import LiveStatus
from foldd.daemon.lock import daemon_lock
from foldd.daemon.orders import carry_out
from foldd.daemon.publish import Publishing
from foldd.daemon.settle import Settled, SettleWatch
from foldd.daemon.watch import InboxWatch

log = logging.getLogger("foldd")

_ENVIRONMENT = (OSError, sqlite3.OperationalError, Unavailable)  # may pass; nothing is lost by trying again
_TURN_SECONDS = 1.0
_SPACING_SECONDS = 0.05  # between two looks at the inbox, however many events there are
_PAUSE_SECONDS = 1.0  # between two tries to mend what failed
_COMPLAINT_SECONDS = 60.0  # between two lines in the log of the same failure


class _Stopped(Exception):
    """The daemon was asked to stop in the middle of a long step, which is done again at the next start."""


class Supervisor:
    """The service. `run` returns when it was asked to stop."""

    def __init__(self, config: Config) -> None:
        self._config, self._settings = config, config.settings
        self._layout = Layout(config.root)
        self._live = LiveStatus(self._layout.live)
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._stopping = False
        self._look = True  # scan the inbox at the next turn
        self._next_scan = 0.0
        self._settled: list[Settled] = []
        self._senders: dict[str, str] = {}
        self._uneven = False  # a step failed half-way; files and ledger may disagree
        self._complaint, self._complained = "", 0.0
        self._watchdog = watchdog_interval_s()
        self._fed = 0.0

    def run(self) -> None:
        """Recovers, serves until SIGTERM or SIGINT, and stops.

        Raises:
            BadSetup: the state directory, the keys or the bus are not in order.
        """
        whole = self._layout.base if self._layout.base.exists() else self._layout.old_base  # where an `init` was cut
        base = read_base_spec(whole / "base.json")
        with ExitStack() as stack:
            self._layout.create()
            stack.enter_context(daemon_lock(self._layout.lock))
            restore_base(self._layout)
            stack.enter_context(self._signals())
            self._ledger = Ledger(self._layout.ledger)
            stack.callback(self._ledger.close)
            identity = daemon_identity(self._config)
            keep = self._settings.retention.generations
            self._committer = Committer(self._layout, self._ledger, identity, base.digest, keep=keep)
            intake = self._settings.intake
            self._intake = Intake(
                self._layout,
                self._ledger,
                max_bundle_bytes=intake.max_bundle_bytes,
                quarantine_bytes=self._settings.retention.quarantine_bytes,
                beat=self._beat,
            )
            self._settle = SettleWatch(intake.settle_seconds, intake.incomplete_seconds, time.monotonic)
            try:
                self._committer.settle_files()
                self._intake.recover()
            except _Stopped:
                return
            except _ENVIRONMENT as error:
                self._stumbled(error)  # serve all the same, and mend when there is room again
            self._publishing = Publishing(self._config, identity, self._ledger, self._submitted)
            stack.enter_context(self._publishing)
            self._selector.register(self._wake_read, selectors.EVENT_READ)
            if intake.watch:
                stack.enter_context(InboxWatch(self._layout.inbox, self.wake))
            self._foreman = Foreman(
                self._config, self._ledger, self._intake, self._committer, self._live, self._selector, self._even_out
            )
            stack.callback(self._foreman.stop)
            if not self._uneven:
                self._publishing.publish_pending()
            self._live.write()
            notify("READY=1")
            log.info("serving %s; drop checkpoints into %s", self._layout.root, self._layout.inbox)
            self._loop()
            notify("STOPPING=1")
        self._live.stopped()
        log.info("stopped")

    def wake(self) -> None:
        """Makes the loop look at the inbox soon; may be called from any thread.

        A file that is being written brings thousands of events a second: until the loop has looked, one is enough.
        """
        if not self._look:
            self._look = True
            self._nudge()

    def _nudge(self) -> None:
        with suppress(BlockingIOError):  # the pipe is full: a wake-up is on its way already
            os.write(self._wake_write, b".")

    def _loop(self) -> None:
        while not self._stopping:
            for key, _ in self._selector.select(self._pause()):
                if key.fd == self._wake_read:
                    os.read(self._wake_read, 4096)
            try:
                self._beat()
                self._turn()
            except _Stopped:
                return
            except _ENVIRONMENT as error:
                self._stumbled(error)
            self._publishing.check()
            self._live.write()

    def _turn(self) -> None:
        if self._uneven and not self._foreman.folding:
            # A step failed half-way: the same that puts things right after a crash does it now.
            self._intake.recover()
            self._even_out()
            self._live.last_error = None
        carry_out(self._layout, self._ledger, self._intake)
        self._take_in()
        self._foreman.tend(may_begin=not self._uneven)

    def _even_out(self) -> None:
        """Makes link, folders and announcement follow the ledger; until that is done, nothing new is begun."""
        self._uneven = True
        self._committer.settle_files()
        self._publishing.publish_pending()
        self._uneven = False

    def _stumbled(self, error: Exception) -> None:
        """The environment failed under the daemon itself: go on serving, and try again in a moment."""
        said, now = str(error), time.monotonic()
        if said != self._complaint or now - self._complained >= _COMPLAINT_SECONDS:
            self._complaint, self._complained = said, now
            log.error("%s Trying again.", said if said.endswith(".") else f"{said}.")
        self._live.last_error = said
        self._uneven = True

    def _beat(self) -> None:
        """Tells systemd that we get on. Sent from the loop and its long steps alone, never from a timer's thread.

        Raises:
            _Stopped: inside a long step, when the daemon was asked to stop.
        """
        now = time.monotonic()
        if self._watchdog and now - self._fed >= self._watchdog:
            self._fed = now
            notify("WATCHDOG=1")
        if self._stopping:
            raise _Stopped

    def _pause(self) -> float:
        if self._uneven:
            wait = _PAUSE_SECONDS
        elif self._settled:
            wait = 0.0
        elif self._look and not self._settle.waiting:
            wait = _SPACING_SECONDS
        else:
            wait = max(0.0, self._next_scan - time.monotonic())
        return min(_TURN_SECONDS, self._watchdog or _TURN_SECONDS, wait)

    # --- intake

    def _submitted(self, path: Path, sender: str) -> None:
        """The bus has put a file into the inbox (from its thread)."""
        self._senders[path.name] = sender
        self.wake()

    def _take_in(self) -> None:
        """One file a turn: hashing takes its time, and the worker wants to be heard in between."""
        if self._uneven:
            return
        if self._settled:
            settled = self._settled.pop(0)
            self._intake.claim(settled, source=self._senders.pop(settled.path.name, "folder"))
            return
        now = time.monotonic()
        # A hint is followed at once when nothing is settling; what is settling is looked at on its own timer.
        if now < self._next_scan and (self._settle.waiting or not self._look):
            return
        self._look = False
        self._layout.inbox.mkdir(exist_ok=True)  # somebody may have removed it
        self._settled = self._settle.scan(self._layout.inbox)
        settle = self._settings.intake.settle_seconds
        soon = max(0.05, min(0.5, settle / 2))
        self._next_scan = now + (soon if self._settle.waiting else self._settings.intake.rescan_seconds)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def stop(number: int, _: object) -> None:
            log.info("%s: stopping", signal.Signals(number).name)
            self._stopping = True
            self._nudge()

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        # Somebody who opens a file just while its lease is asked for (settle.py) makes the kernel send this: fatal.
        before[signal.SIGIO] = signal.signal(signal.SIGIO, signal.SIG_IGN)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
