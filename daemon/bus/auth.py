"""Who may speak: allow-lists of public keys, and the ZAP authenticator that libzmq asks about every connection.

libzmq lets every key in where no authenticator answers (zeromq/libzmq#2594), and pyzmq's own dies of an exception
in its callback (zeromq/pyzmq#1520), lets NULL clients pass and costs 9 MB through asyncio. So this is our own, 40
lines, and closed in four ways: a socket cannot be bound before it runs; its ZAP endpoint outlives the sockets, so
that a dead thread leaves handshakes unanswered; `ZAP_ENFORCE_DOMAIN` makes libzmq refuse where nobody answers; and
the serving loop closes its sockets when `assert_alive` fails. Requests are authorised once more, one by one.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import zmq

from foldd.core.errors import BadSetup, Unavailable
from foldd.core.signatures import PublicIdentity, read_allow_list, read_public

log = logging.getLogger("foldd.bus")

_ZAP_ENDPOINT = "inproc://zeromq.zap.01"


class AllowList:
    """The keys in one folder of `.pub` files: CURVE public key (hexadecimal) → name."""

    def __init__(self, folder: Path | None = None, keys: Sequence[PublicIdentity] = ()) -> None:
        """Reads the folder strictly: a broken file is an error for whoever starts the daemon.

        Raises:
            BadSetup: `no-allow-list`, `no-key`, `bad-key`.
        """
        self._folder = folder
        self._fixed = {identity.curve_public: identity.name for identity in keys}
        self._complained: dict[Path, str] = {}  # what was said about a file, so that it is said once
        self._stamp = self._look()
        loaded = read_allow_list(folder) if folder is not None else []
        self._keys: Mapping[str, str] = {**self._fixed, **{identity.curve_public: identity.name for identity in loaded}}

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def __len__(self) -> int:
        return len(self._keys)

    def name(self, key: str) -> str:
        return self._keys.get(key, "unknown")

    def reload(self) -> frozenset[str]:
        """Looks at the folder again; the keys that are no longer admitted.

        While the daemon runs, a file that cannot be read admits nobody, and the others still count. The log says so
        once.
        """
        if self._folder is None or (stamp := self._look()) == self._stamp:
            return frozenset()
        loaded, complained = {}, {}
        for path in sorted(self._folder.glob("*.pub")) if self._folder.is_dir() else ():
            try:
                identity = read_public(path)
            except BadSetup as error:
                complained[path] = error.what
                if self._complained.get(path) != error.what:
                    log.warning("allow-list: %s", error.what)
                continue
            loaded[identity.curve_public] = identity.name
        gone = frozenset(self._keys) - frozenset(loaded) - frozenset(self._fixed)
        self._keys, self._stamp, self._complained = {**self._fixed, **loaded}, stamp, complained
        return gone

    def _look(self) -> tuple[object, ...]:
        if self._folder is None:
            return ()
        return tuple(_stamp(path) for path in sorted(self._folder.glob("*.pub")))


def _stamp(path: Path) -> tuple[object, ...]:
    try:
        stat = path.stat()
    except OSError:  # a dangling link, or gone between listing and looking: the next look differs in that case
        return (path.name,)
    return path.name, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size


class Authenticator:
    """Answers ZAP requests of one zmq context in a thread of its own."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], domains: Mapping[str, Sequence[AllowList]]) -> None:
        """`domains` names, for each ZAP domain, the lists of which any one admits."""
        self._domains = domains
        self._context = context
        self._socket: zmq.Socket[bytes] | None = None
        self._thread: threading.Thread | None = None
        self._wake = -1
        self.rejections = 0

    def start(self) -> None:
        self._socket = self._context.socket(zmq.REP)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(_ZAP_ENDPOINT)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._serve, name="foldd-zap", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread. Call it after the sockets that it protects are closed, never before."""
        if self._thread is not None:
            os.eventfd_write(self._wake, 1)
            self._thread.join()
            self._thread = None
            os.close(self._wake)
        if self._socket is not None:
            self._socket.close(linger=0)
            self._socket = None

    @property
    def alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive() and self._socket is not None

    def assert_alive(self) -> None:
        """
        Raises:
            Unavailable: `authenticator-dead`: whoever serves must close its sockets now.
        """
        if not self.alive:
            raise Unavailable(
                "authenticator-dead",
                "The authenticator of the bus is not running.",
                why="its thread failed; without it every key would be admitted, so the bus is closed.",
                remedy="Restart the daemon, and report what the log says above this line.",
            )

    def _serve(self) -> None:
        socket = self._socket
        assert socket is not None
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLIN)
        poller.register(self._wake, zmq.POLLIN)
        while self._wake not in (ready := dict(poller.poll())):
            if socket in ready:
                socket.send_multipart(self._answer(socket.recv_multipart()))

    def _answer(self, frames: list[bytes]) -> list[bytes]:
        request = frames[1] if len(frames) > 1 else b""
        admitted = None
        if len(frames) == 7 and frames[0] == b"1.0" and frames[5] == b"CURVE":
            key = frames[6].hex()
            lists = self._domains.get(frames[2].decode("utf-8", "replace"), ())
            admitted = key if any(key in allowed for allowed in lists) else None
        if admitted is None:
            self.rejections += 1
            log.warning("refused a connection from %s", b"".join(frames[3:4]).decode("utf-8", "replace"))
            return [b"1.0", request, b"400", b"this key is not on the allow-list", b"", b""]
        return [b"1.0", request, b"200", b"OK", admitted.encode(), b""]
