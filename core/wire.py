"""What is said on the bus: message structs and their strict decoding; no sockets here.

A message is one or two frames: a header (msgpack map, `type` names the message) and, where data travels, the
bytes themselves as the second frame, never copied through msgpack. Every field has bounds and unknown fields are
refused, so that a decoded message needs no further checking of its form. docs/bus.md tells who says what when.
"""

from __future__ import annotations

import ipaddress
from typing import Annotated
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from foldd.core.errors import BadRequest, BadSetup

PROTOCOL = 1
MAX_HEADER_BYTES = 16 * 1024
MAX_CHUNK_BYTES = 4 * 1024 * 1024
CHUNK_BYTES = 256 * 1024  # as in zguide's file transfer: large enough for throughput, small enough to share a link
CREDIT = 10  # chunks under way at once, so 2.5 MiB for each client at the sending side
MANIFEST_TOPIC = b"manifest"  # first frame on the announcement socket; the second is the signed manifest

Sha256 = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
FileName = Annotated[str, Meta(min_length=1, max_length=255)]
Count = Annotated[int, Meta(ge=0, le=2**53)]
ChunkLength = Annotated[int, Meta(ge=1, le=MAX_CHUNK_BYTES)]
Credit = Annotated[int, Meta(ge=1, le=1000)]
Text = Annotated[str, Meta(max_length=2000)]


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type"):
    """Base of all messages."""


class Offer(_Message, frozen=True, tag="offer"):
    """Submitter → daemon: I have this file. Repeated whenever the answer does not come."""

    name: FileName
    size: Count  # bytes
    sha256: Sha256
    protocol: int = PROTOCOL


class Chunk(_Message, frozen=True, tag="chunk"):
    """Submitter → daemon, with data: the bytes from `offset` on."""

    sha256: Sha256
    offset: Count


class GetManifest(_Message, frozen=True, tag="get-manifest"):
    """Device → daemon: which generation is current?"""

    protocol: int = PROTOCOL


class GetArtifact(_Message, frozen=True, tag="get-artifact"):
    """Device → daemon: send me this piece."""

    sha256: Sha256
    offset: Count
    length: ChunkLength


class Subscribe(_Message, frozen=True, tag="subscribe"):
    """Daemon → publisher: tell me what you have. Repeated every few seconds, so that nothing hangs on one message."""

    protocol: int = PROTOCOL


class GetBundle(_Message, frozen=True, tag="get-bundle"):
    """Daemon → publisher: send me this piece."""

    sha256: Sha256
    offset: Count
    length: ChunkLength


class Stored(_Message, frozen=True, tag="stored"):
    """Daemon → publisher: the bundle is durable here."""

    sha256: Sha256


class Declined(_Message, frozen=True, tag="declined"):
    """Daemon → publisher: the bundle will not be taken."""

    sha256: Sha256
    code: Text
    what: Text


class Have(_Message, frozen=True, tag="have"):
    """Daemon → submitter: these bytes are durable here already; `state` says how far they came."""

    sha256: Sha256
    state: Text


class Go(_Message, frozen=True, tag="go"):
    """Daemon → submitter: send from `offset`, in chunks of at most `chunk_bytes`, at most `credit` unacknowledged."""

    sha256: Sha256
    offset: Count
    chunk_bytes: ChunkLength
    credit: Credit


class Ack(_Message, frozen=True, tag="ack"):
    """Daemon → submitter: everything below `offset` has arrived (not yet durable)."""

    sha256: Sha256
    offset: Count


class Wait(_Message, frozen=True, tag="wait"):
    """Daemon → submitter: all is well, offer again after `seconds`."""

    sha256: Sha256
    seconds: Annotated[float, Meta(ge=0, le=3600)]
    what: Text


class Durable(_Message, frozen=True, tag="durable"):
    """Daemon → submitter: verified, synced to disk and in the inbox under `name`."""

    sha256: Sha256
    name: FileName


class Refuse(_Message, frozen=True, tag="refuse"):
    """No. `retry` says whether asking again later may help. `sha256` is empty where the request had none."""

    sha256: Annotated[str, Meta(max_length=64)]
    code: Text
    what: Text
    retry: bool = False


class ManifestIs(_Message, frozen=True, tag="manifest-is"):
    """Daemon → device, with the signed manifest as data. Pieces longer than `chunk_bytes` are not sent."""

    generation: Count
    chunk_bytes: ChunkLength


class Data(_Message, frozen=True, tag="data"):
    """Daemon → device, publisher → daemon, with data: the piece from `offset` on of a whole of `total` bytes."""

    sha256: Sha256
    offset: Count
    total: Count


class Announce(_Message, frozen=True, tag="announce"):
    """Publisher → daemon: this bundle can be pulled."""

    name: FileName
    size: Count
    sha256: Sha256
    chunk_bytes: ChunkLength


Request = Offer | Chunk | GetManifest | GetArtifact | Subscribe | GetBundle | Stored | Declined
Reply = Have | Go | Ack | Wait | Durable | Refuse | ManifestIs | Data | Announce

_encoder = msgspec.msgpack.Encoder()
_requests = msgspec.msgpack.Decoder(Request)
_replies = msgspec.msgpack.Decoder(Reply)


def encode(message: Request | Reply) -> bytes:
    """The header frame of a message."""
    return _encoder.encode(message)


def decode_request(header: bytes) -> Request:
    """A request from its header frame.

    Raises:
        BadRequest: `malformed`.
    """
    _check_size(header)
    try:
        request: Request = _requests.decode(header)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest("malformed", f"A request cannot be read: {error}.") from error
    return request


def decode_reply(header: bytes) -> Reply:
    """A reply from its header frame.

    Raises:
        BadRequest: `malformed`.
    """
    _check_size(header)
    try:
        reply: Reply = _replies.decode(header)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest("malformed", f"A reply cannot be read: {error}.") from error
    return reply


def check_endpoint(endpoint: str, *, bind: bool = False) -> None:
    """Whether an endpoint is written as one; libzmq takes a port beyond 65535 and uses another.

    Args:
        bind: it is to be bound: the host `*` is every address of this machine, the port `*` or 0 a free one.

    Raises:
        BadSetup: `bad-endpoint`.
    """
    scheme, separator, rest = endpoint.partition("://")
    host, _, port = rest.rpartition(":")
    if not separator:
        what = "names no transport"
    elif scheme in ("ipc", "inproc"):
        what = "" if rest else "names no path"
    elif scheme != "tcp":
        what = f"has the transport {scheme!r}, which the bus does not speak"
    elif not host or (host == "*" and not bind):
        what = "names no host"
    elif bind and port in ("*", "0"):
        what = ""
    elif not (port.isascii() and port.isdigit() and 1 <= int(port[:6]) <= 65535):
        what = f"has the port {port[:20]!r}, and ports are 1 to 65535"
    else:
        what = ""
    if what:
        written = f"tcp://{endpoint}" if not separator and ":" in endpoint else "tcp://host:port"
        raise BadSetup("bad-endpoint", f"{endpoint!r} {what}.", remedy=f"Write {written}.")


def is_local(endpoint: str) -> bool:
    """Whether an endpoint cannot be reached from another machine, so that it may be spoken to in plaintext."""
    try:
        parts = urlsplit(endpoint)
        host = parts.netloc.rpartition(":")[0].strip("[]")
        return parts.scheme in ("ipc", "inproc") or host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_size(header: bytes) -> None:
    if len(header) > MAX_HEADER_BYTES:
        raise BadRequest("malformed", f"A header of {len(header)} bytes came, the limit is {MAX_HEADER_BYTES}.")
