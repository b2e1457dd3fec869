"""When is a dropped file complete? Nobody announces it, so three signs are taken together.

A file is settled when its size, times and inode have not changed for the quiet time, no process has it open for
writing (`F_SETLEASE`, where the kernel lets us ask), and its length is what its own header promises. File events are
only hints to look again: inotify loses them on bursts, and `mv` into the folder gives only `created`.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from foldd.core.tensorfile import header_length

IGNORED_ENDINGS = (".tmp", ".part", ".partial", ".filepart", ".crdownload", ".swp", "~")


@dataclass(frozen=True)
class Settled:
    """An inbox entry that nobody is writing any more."""

    path: Path
    order: tuple[int, str]  # modification time in ns, name: the order in which files of one scan are folded
    waited_seconds: float
    is_file: bool  # a regular file, not a folder, link, pipe or device


@dataclass
class _Seen:
    signature: tuple[int, ...]
    since: float
    first: float


class SettleWatch:
    """Remembers what each inbox entry looked like, and tells which have come to rest.

    Args:
        settle_seconds: quiet time.
        incomplete_seconds: how long to wait for a file that is shorter than its header promises; afterwards
            it is handed on as it is, and verification names what is wrong.
        clock: monotonic seconds.
    """

    def __init__(self, settle_seconds: float, incomplete_seconds: float, clock: Callable[[], float]) -> None:
        self._settle, self._incomplete, self._clock = settle_seconds, incomplete_seconds, clock
        self._seen: dict[Path, _Seen] = {}

    @property
    def waiting(self) -> int:
        """Entries that were there at the last scan and had not settled."""
        return len(self._seen)

    def scan(self, folder: Path) -> list[Settled]:
        """Looks at every entry once; settled ones are returned in folding order and forgotten."""
        now = self._clock()
        present: dict[Path, _Seen] = {}
        settled = []
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name.endswith(IGNORED_ENDINGS):
                    continue
                try:
                    info = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue  # gone since the listing
                path = Path(entry.path)
                signature = (info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino)
                seen = self._seen.get(path)
                if seen is None or seen.signature != signature:
                    seen = _Seen(signature, now, seen.first if seen else now)
                quiet = now - seen.since
                is_file = stat.S_ISREG(info.st_mode)
                if quiet >= self._settle and (not is_file or self._complete(path, info.st_size, quiet)):
                    settled.append(Settled(path, (info.st_mtime_ns, entry.name), now - seen.first, is_file))
                else:
                    present[path] = seen
        self._seen = present
        return sorted(settled, key=lambda item: item.order)

    def _complete(self, path: Path, size: int, quiet: float) -> bool:
        if being_written(path):
            return False
        promised = header_length(path)
        return promised is None or size >= promised or quiet >= self._incomplete


def being_written(path: Path) -> bool:
    """Whether some process has the file open for writing; False also where the kernel will not say."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.fcntl(handle, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(handle, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except BlockingIOError:
        return True
    except OSError:
        return False  # not our file and no CAP_LEASE, or a file system without leases
    finally:
        os.close(handle)
    return False
