"""File events as hints: something happened in the inbox, look again. The scan is the truth (see settle.py)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from watchdog.events import FileSystemEventHandler
from watchdog.observers import Observer

log = logging.getLogger("foldd.watch")


class InboxWatch:
    """Calls `hint` from a thread of its own whenever the inbox may have changed, and after an inotify overflow."""

    def __init__(self, inbox: Path, hint: Callable[[], None]) -> None:
        self._inbox, self._hint = inbox, hint
        self._observer: Any = None
        self._overflow = _OverflowHandler(hint)

    def __enter__(self) -> InboxWatch:
        hint = self._hint

        class Handler(FileSystemEventHandler):
            def on_any_event(self, event: Any) -> None:
                if event.event_type not in ("opened", "closed_no_write"):  # reading is no change; we read ourselves
                    hint()

        # watchdog tells of an overflow in its log only; the handler gets no event.
        logging.getLogger("watchdog.observers").addHandler(self._overflow)
        observer = Observer()
        try:
            observer.schedule(Handler(), str(self._inbox), recursive=False)
            observer.start()
            self._observer = observer
        except OSError as error:
            log.warning("no file events (%s); the inbox is scanned on a timer only", error)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        logging.getLogger("watchdog.observers").removeHandler(self._overflow)
        if self._observer is not None:
            self._observer.stop()
            self._observer.join(5)


class _OverflowHandler(logging.Handler):
    def __init__(self, hint: Callable[[], None]) -> None:
        super().__init__(logging.WARNING)
        self._hint = hint

    def emit(self, record: logging.LogRecord) -> None:
        if "overflow" in record.getMessage().lower():
            self._hint()
