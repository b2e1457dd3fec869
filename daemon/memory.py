"""Resident memory of a process, from /proc, and how to give back what is free."""

from __future__ import annotations

import ctypes
from pathlib import Path

_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1  # glibc's malloc.h
_LARGE_BYTES = 256 * 1024
_SMALL_MODEL = 64 * 1024**2


def rss_bytes(pid: int | str = "self") -> int:
    """Resident memory now; 0 where the process is gone."""
    return _field(pid, "VmRSS")


def peak_rss_bytes(pid: int | str = "self") -> int:
    """High-water mark of resident memory since the start, or since `reset_peak`."""
    return _field(pid, "VmHWM")


def reset_peak() -> None:
    """Sets this process' high-water mark back to what is resident now, where the kernel allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # the mark then stands since the process began: too high, never too low


def return_freed_memory(model_bytes: int) -> None:
    """Makes this process give large pieces of memory back as soon as they are free.

    glibc keeps pieces of up to 32 MB for later, as soon as one was ever freed. Tensors of all sizes that come and go
    leave gaps in between: in a fold nearly as large as the model. Pieces of 2 MB still leave gaps that differ from fold
    to fold by a few percent of it. Beside a small model the gaps are small too, and fetching every piece anew would
    cost a third of a fold's time: then nothing is changed, nor where there is no glibc.
    """
    if model_bytes < _SMALL_MODEL:
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return
    mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
    mallopt(_M_TRIM_THRESHOLD, 4 * _LARGE_BYTES)


def available_bytes() -> int:
    """Memory that the machine can still give without swapping; 0 where it does not say."""
    return _kilobytes(Path("/proc/meminfo"), "MemAvailable")


def _field(pid: int | str, name: str) -> int:
    return _kilobytes(Path(f"/proc/{pid}/status"), name)


def _kilobytes(path: Path, name: str) -> int:
    """A `name: n kB` line of a file in /proc, in bytes; 0 where the file or the line is missing."""
    try:
        text = path.read_text()
    except OSError:
        return 0
    line = next((line for line in text.splitlines() if line.startswith(name)), f"{name}: 0 kB")
    return int(line.split()[1]) * 1024
