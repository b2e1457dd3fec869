"""Resident memory of a process, from /proc."""

from __future__ import annotations

from pathlib import Path


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


def _field(pid: int | str, name: str) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    line = next((line for line in status.splitlines() if line.startswith(name)), f"{name}: 0 kB")
    return int(line.split()[1]) * 1024


def available_bytes() -> int:
    """Memory that the machine can still give without swapping; 0 where it does not say."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return 0
    line = next((line for line in text.splitlines() if line.startswith("MemAvailable")), "MemAvailable: 0 kB")
    return int(line.split()[1]) * 1024
