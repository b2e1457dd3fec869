"""What devices ask for, announcements, and frames that make no sense."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import pytest
import zmq
from bus_kit import CHUNK, DAEMON, DEVICE, SUBMITTER, RawClient, noise, publish, running, wait_for

from foldd.core import wire
from foldd.core.digests import sha256_bytes
from foldd.core.errors import BadRequest
from foldd.core.window import PullWindow
from foldd.core.wire import Data, GetArtifact, GetManifest, ManifestIs, Offer, Refuse


def test_before_the_first_fold_there_is_no_generation(tmp_path: Path) -> None:
    with running(tmp_path) as box, RawClient(box.endpoint, DEVICE) as client:
        answer = client.ask(GetManifest())
        assert answer is not None
        assert isinstance(answer[0], Refuse)
        assert (answer[0].code, answer[0].retry) == ("no-generation", True)


def test_manifest_and_artifact_come_as_they_are(tmp_path: Path) -> None:
    content = noise(3 * CHUNK + 5)
    sha256 = sha256_bytes(content)
    with running(tmp_path) as box, RawClient(box.endpoint, DEVICE) as client:
        data = publish(box.root, 1, content)
        assert client.ask(GetManifest()) == (ManifestIs(1, CHUNK), data)
        got, window = b"", PullWindow(len(content), 0, CHUNK)
        for offset, length in window.wanted():
            piece = client.ask(GetArtifact(sha256, offset, length))
            assert piece is not None
            assert piece[0] == Data(sha256, offset, len(content))
            got += piece[1]
        assert got == content
        beyond = client.ask(GetArtifact(sha256, len(content), 1))
        assert beyond is not None
        assert isinstance(beyond[0], Refuse)
        greedy = client.ask(GetArtifact(sha256, 0, 4 * CHUNK))
        assert greedy is not None
        assert len(greedy[1]) == CHUNK


def test_only_artifacts_of_generations_are_served(tmp_path: Path) -> None:
    secret = noise(100)
    with running(tmp_path) as box, RawClient(box.endpoint, DEVICE) as client:
        publish(box.root, 1, b"artifact")
        (box.root / "ledger.sqlite3").write_bytes(secret)
        answer = client.ask(GetArtifact(sha256_bytes(secret), 0, 100))
        assert answer is not None
        assert isinstance(answer[0], Refuse)
        assert answer[0].code == "artifact-gone"


def test_the_generation_before_is_still_served_to_who_is_in_its_middle(tmp_path: Path) -> None:
    with running(tmp_path) as box, RawClient(box.endpoint, DEVICE) as client:
        publish(box.root, 1, b"first")
        client.ask(GetManifest())
        publish(box.root, 2, b"second")
        client.ask(GetManifest())
        answer = client.ask(GetArtifact(sha256_bytes(b"first"), 0, 100))
        assert answer is not None
        assert answer[1] == b"first"


def test_announcements_reach_subscribers_and_late_joiners_get_the_last(tmp_path: Path) -> None:
    with running(tmp_path) as box:
        first = publish(box.root, 1, b"first")
        box.server.announce()
        with RawClient(box.server.announce_endpoint, DEVICE, kind=zmq.SUB) as early:
            assert early.socket.poll(5000)
            assert early.socket.recv_multipart() == [wire.MANIFEST_TOPIC, first]
            second = publish(box.root, 2, b"second")
            box.server.announce()
            assert early.socket.poll(5000)
            assert early.socket.recv_multipart() == [wire.MANIFEST_TOPIC, second]
            with RawClient(box.server.announce_endpoint, DEVICE, kind=zmq.SUB) as late:
                assert late.socket.poll(5000)
                assert late.socket.recv_multipart() == [wire.MANIFEST_TOPIC, second]


def test_announcements_never_carry_weights(tmp_path: Path) -> None:
    content = noise(50 * CHUNK)
    with running(tmp_path) as box, RawClient(box.server.announce_endpoint, DEVICE, kind=zmq.SUB) as listener:
        publish(box.root, 1, content)
        box.server.announce()
        assert listener.socket.poll(5000)
        assert sum(map(len, listener.socket.recv_multipart())) < 2 * CHUNK


def test_a_broken_current_generation_is_no_reason_to_die(tmp_path: Path) -> None:
    with running(tmp_path) as box, RawClient(box.endpoint, DEVICE) as client:
        publish(box.root, 1, b"artifact")
        manifest = box.root / "current" / "manifest.json"
        good = manifest.read_bytes()
        manifest.write_bytes(b"{")
        answer = client.ask(GetManifest())
        assert answer is not None
        assert isinstance(answer[0], Refuse)
        manifest.write_bytes(good)
        assert client.ask(GetManifest()) == (ManifestIs(1, CHUNK), good)


def fuzzed(seed: int) -> list[bytes]:
    """Frames near and far from what is said on the bus."""
    chance = random.Random(seed)
    header = bytearray(wire.encode(chance.choice(_SPOKEN)))
    kind = chance.randrange(6)
    if kind == 0:
        header = bytearray(chance.randbytes(chance.randrange(64)))
    elif kind == 1:
        for _ in range(chance.randrange(1, 4)):
            header[chance.randrange(len(header))] = chance.randrange(256)
    elif kind == 2:
        del header[chance.randrange(len(header)) :]
    elif kind == 3:
        header = bytearray(b"\x91" * chance.randrange(1, 5000))  # arrays in arrays
    elif seed % 100 == 0:  # rarely: it is over the limit on messages, so that the connection ends
        header = bytearray(wire.MAX_HEADER_BYTES + 1)
    return [bytes(header), *(chance.randbytes(chance.randrange(CHUNK)) for _ in range(chance.randrange(4)))][
        chance.randrange(2) :
    ] or [b""]


_SPOKEN: list[wire.Request] = [
    Offer("a.safetensors", 10, "0" * 64),
    wire.Chunk("0" * 64, 0),
    GetManifest(),
    GetArtifact("0" * 64, 0, 10),
    wire.Subscribe(),
    wire.GetBundle("0" * 64, 0, 10),
    wire.Stored("0" * 64),
    wire.Declined("0" * 64, "c", "w"),
]


def test_frames_that_make_no_sense_hurt_nobody(tmp_path: Path) -> None:
    with (
        running(tmp_path) as box,
        RawClient(box.endpoint, SUBMITTER) as vandal,
        RawClient(box.server.announce_endpoint, DEVICE, kind=zmq.XSUB) as shouter,
        RawClient(box.endpoint, DEVICE) as client,
    ):
        publish(box.root, 1, b"artifact")
        for seed in range(1, 3000):
            vandal.socket.send_multipart(fuzzed(seed))
            if seed % 10 == 0:
                shouter.socket.send_multipart(fuzzed(seed))
            while vandal.socket.poll(0):
                vandal.socket.recv_multipart()
        vandal.socket.send(b"x" * (2 * wire.MAX_HEADER_BYTES))  # over MAXMSGSIZE: only its own connection ends
        answer = client.ask(GetManifest())
        assert answer is not None
        assert isinstance(answer[0], ManifestIs)
        assert box.server.alive
        wait_for(lambda: box.server.counts["malformed"] > 500)


@pytest.mark.parametrize(
    "message",
    [
        {"type": "offer", "name": "a", "size": -1, "sha256": "0" * 64},
        {"type": "offer", "name": "a", "size": 1, "sha256": "0" * 64 + "\n"},
        {"type": "offer", "name": "a", "size": 1, "sha256": "../" + "0" * 61},
        {"type": "offer", "name": "", "size": 1, "sha256": "0" * 64},
        {"type": "offer", "name": "a", "size": 1, "sha256": "0" * 64, "extra": 1},
        {"type": "get-artifact", "sha256": "0" * 64, "offset": 0, "length": 2**40},
        {"type": "nonsense"},
        {},
        None,
    ],
)
def test_decoding_is_strict(message: object) -> None:
    with pytest.raises(BadRequest):
        wire.decode_request(msgspec.msgpack.encode(message))


def test_a_reply_is_no_request_and_back() -> None:
    with pytest.raises(BadRequest):
        wire.decode_request(wire.encode(wire.Have("0" * 64, "x")))
    with pytest.raises(BadRequest):
        wire.decode_reply(wire.encode(GetManifest()))


def test_a_window_asks_for_everything_once_and_for_lost_pieces_again() -> None:
    window = PullWindow(25, 2, chunk_bytes=4, credit=3)
    assert window.wanted() == [(2, 4), (6, 4), (10, 4)]
    assert window.wanted() == []
    assert window.accept(2, 4)
    assert window.wanted() == [(14, 4)]
    assert not window.accept(2, 4)
    assert not window.accept(6, 5)
    assert not window.accept(10, 4)  # 6 was lost
    assert window.wanted() == [(6, 4), (10, 4), (14, 4)]
    assert not window.accept(14, 4)  # was under way already
    assert window.wanted() == []
    assert window.accept(6, 4)
    window.restart()
    assert window.wanted() == [(10, 4), (14, 4), (18, 4)]
    while not window.complete:
        assert window.accept(window.done, min(4, 25 - window.done))
    assert window.wanted() == []


def test_a_window_takes_over_the_senders_piece_size() -> None:
    window = PullWindow(20, 0, chunk_bytes=8, credit=2)
    assert window.wanted() == [(0, 8), (8, 8)]
    assert window.accept(0, 3)
    assert window.wanted() == [(3, 3), (6, 3)]
    assert not window.accept(8, 3)
    assert window.wanted() == []
    assert window.accept(3, 3)
    assert window.wanted() == [(9, 3)]


def test_the_daemons_key_is_the_one_that_signs() -> None:
    assert DAEMON.public.verify_key != DAEMON.public.curve_public
