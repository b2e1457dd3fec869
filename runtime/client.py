"""The runtime on a device: follows its daemon, and answers from the newest generation that it could verify."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from foldd.core.errors import FolddError
from foldd.core.signatures import PublicIdentity
from foldd.runtime.fetch import Fetcher, Source
from foldd.runtime.slot import Slot, SwapPolicy
from foldd.runtime.store import KEEP_GENERATIONS, Store

log = logging.getLogger("foldd.runtime")

_TURN_S = 0.5
_BACKOFF_S = (1.0, 30.0)  # after the first and after many failures in a row


class Runtime:
    """A store, a slot and, where there is a source, a fetcher.

    Either call `poll` from a loop of your own, or `start` a thread that does; `infer` works from any thread.
    """

    def __init__(
        self,
        directory: Path,
        source: Source | None = None,
        trusted: Iterable[PublicIdentity] | None = None,
        *,
        policy: SwapPolicy = SwapPolicy.AVAILABILITY,
        threads: int = 0,
        keep: int = KEEP_GENERATIONS,
    ) -> None:
        """
        Args:
            directory: the device's store, or without a source any folder with `current`, such as a daemon's state.
            trusted: whose signature a manifest must have; needed with a source.

        Raises:
            BadSetup: `plaintext-not-loopback`, `no-server-key`, `bad-endpoint`, `broken-store`.
            Unavailable: `store-unwritable`.
        """
        trusted = None if trusted is None else tuple(trusted)
        self._on_turn: Callable[[], None] = lambda: None
        self._fetcher = None
        if source is not None:
            store = Store(directory, trusted or (), keep=keep)
            self._fetcher = Fetcher(source, store, progress=lambda done, total: self._on_turn())
        self.slot = Slot(directory, trusted, policy=policy, threads=threads)
        self.slot.refresh()
        self.last_error: FolddError | None = None  # of fetching; the slot has its own
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def poll(self, timeout_s: float) -> int | None:
        """Waits up to `timeout_s` for a new generation, fetches and swaps; its number, or None.

        Raises:
            FolddError: as `Fetcher.poll`; what served before goes on serving.
        """
        if self._fetcher is None:
            self._stopping.wait(timeout_s)
        else:
            try:
                self._fetcher.poll(timeout_s)
                self.last_error = None
            except FolddError as error:
                self.last_error = error
                raise
        return self.slot.generation if self.slot.refresh() else None

    def infer(self, task: str, inputs: np.ndarray) -> tuple[np.ndarray, int]:
        """(logits [n, classes], generation); see `Slot.infer`."""
        return self.slot.infer(task, inputs)

    def start(self, on_turn: Callable[[], None] = lambda: None) -> None:
        """Follows in a thread; `on_turn` is called whenever its loop or a transfer got on, for a watchdog."""
        self._on_turn = on_turn
        self._thread = threading.Thread(target=self._follow, name="foldd-runtime", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        self._stopping.set()
        if self._fetcher is not None:
            self._fetcher.stopping.set()
        if self._thread is not None:
            self._thread.join(timeout_s)
        elif self._fetcher is not None:
            self._fetcher.close()

    @property
    def alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _follow(self) -> None:
        failures, resume = 0, 0.0
        try:
            while not self._stopping.is_set():
                self._on_turn()
                if time.monotonic() < resume:
                    self._stopping.wait(_TURN_S)
                    continue
                try:
                    self.poll(_TURN_S)
                    failures = 0
                except FolddError as error:
                    if failures == 0 and not self._stopping.is_set():
                        log.warning("%s", error)
                    resume = time.monotonic() + min(_BACKOFF_S[0] * 2**failures, _BACKOFF_S[1])
                    failures = min(failures + 1, 10)
        finally:
            if self._fetcher is not None:
                self._fetcher.close()
