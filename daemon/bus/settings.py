"""The `[bus]` table of config.toml."""

from __future__ import annotations

import msgspec

from foldd.core.bundle import MAX_BUNDLE_BYTES
from foldd.core.wire import CHUNK_BYTES, CREDIT


class PublisherSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A checkpoint publisher that the daemon listens to."""

    endpoint: str  # tcp://host:port
    key: str = ""  # path of the publisher's .pub; may be empty only with `plaintext`


class BusSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything about the bus. All off by default: a box that is fed through its folder has no open port."""

    bind: str = ""  # endpoint for requests (submit, fetch), for example tcp://*:5757; empty: off
    announce: str = ""  # endpoint on which new generations are announced; empty: off
    identity: str = ""  # path of the daemon's .key
    submitters: str = ""  # folder of .pub files: who may send checkpoints; empty: nobody
    devices: str = ""  # folder of .pub files: who may fetch generations; empty: nobody
    subscribe: tuple[PublisherSettings, ...] = ()  # publishers whose bundles are pulled when announced
    plaintext: bool = False  # no encryption, no allow-lists; only on loopback, ipc and inproc endpoints
    credit: int = CREDIT  # chunks in flight for each client
    chunk_bytes: int = CHUNK_BYTES  # bytes of one chunk, at most 4 MiB
    max_bundle_bytes: int = MAX_BUNDLE_BYTES  # bytes of one submitted file
    max_partials: int = 16  # transfers under way at the same time
    max_partial_bytes: int = 2 * MAX_BUNDLE_BYTES  # bytes of unfinished transfers: promised if active, else real
    min_free_bytes: int = 256 * 1024 * 1024  # bytes of disk that a transfer must leave free
    stale_partial_s: float = 86_400.0  # seconds after which an abandoned transfer's bytes are deleted
    allow_list_poll_s: float = 1.0  # seconds between looks at the allow-lists: how soon a revoked key is out
    subscribe_poll_s: float = 5.0  # seconds between questions to each publisher

    def __post_init__(self) -> None:
        if not 1024 <= self.chunk_bytes <= 4 * 1024 * 1024:
            raise ValueError("chunk_bytes must be between 1024 and 4194304")
        if not 1 <= self.credit <= 1000:
            raise ValueError("credit must be between 1 and 1000")
        if self.max_partials < 1:
            raise ValueError("max_partials must be at least 1")
        if min(self.allow_list_poll_s, self.subscribe_poll_s, self.stale_partial_s) <= 0:
            raise ValueError("allow_list_poll_s, subscribe_poll_s and stale_partial_s must be above 0")
