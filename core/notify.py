"""systemd's notifications: one local datagram each, so no library. The only socket that core knows."""

from __future__ import annotations

import os
import socket


def notify(state: str) -> bool:
    """Sends `READY=1`, `WATCHDOG=1`, `STOPPING=1` or `STATUS=…`; whether systemd is there to hear it."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        return False
    address = "\0" + path[1:] if path[0] == "@" else path
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as link:
            link.sendto(state.encode(), address)
    except OSError:
        return False
    return True


def watchdog_interval_s() -> float | None:
    """How often `WATCHDOG=1` should be sent: half of what systemd allows; None where it does not watch us."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    micro = os.environ.get("WATCHDOG_USEC", "")
    return int(micro) / 2e6 if micro.isdecimal() and int(micro) > 0 else None
