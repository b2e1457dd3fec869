"""Sending a checkpoint: whole, cut, wrong, too large, twice."""

from __future__ import annotations

import threading
from pathlib import Path

import msgspec
import pytest
from bus_kit import (
    CHUNK,
    DAEMON,
    DEVICE,
    STRANGER,
    SUBMITTER,
    RawClient,
    make_file,
    noise,
    running,
    wait_for,
)

from foldd.core.digests import sha256_bytes
from foldd.core.errors import BadCheckpoint, BadRequest, BadSetup, Unavailable
from foldd.core.signatures import Identity, new_identity
from foldd.core.wire import CHUNK_BYTES, Ack, Chunk, Durable, Go, Have, Offer, Refuse
from foldd.daemon.bus.submit import SubmitResult, submit_file


def submit(path: Path, endpoint: str, identity: Identity | None = SUBMITTER, **how: object) -> SubmitResult:
    server = None if identity is None else DAEMON.public
    return submit_file(path, endpoint, identity, server, timeout_s=10.0, **how)  # type: ignore[arg-type]


def test_a_file_arrives_whole_and_durable(tmp_path: Path) -> None:
    path, seen = make_file(tmp_path / "cats.safetensors", 100 * CHUNK + 1), []
    with running(tmp_path) as box:
        result = submit(path, box.endpoint, progress=lambda done, total: seen.append((done, total)))
        assert result.state == "durable"
        assert result.sent == result.size == 100 * CHUNK + 1
        assert (box.root / "inbox" / "cats.safetensors").read_bytes() == path.read_bytes()
        assert box.submitted == [box.root / "inbox" / "cats.safetensors"]
        assert list((box.root / "work" / "incoming").iterdir()) == []
    assert seen[-1] == (result.size, result.size)
    assert seen == sorted(seen)


def test_chunks_of_the_ordinary_size_fit_into_a_message(tmp_path: Path) -> None:
    """Encryption adds to every frame: a limit of just the chunk's size would end the connection."""
    path = make_file(tmp_path / "cats.safetensors", 3_000_000)
    for chunk_bytes in (CHUNK_BYTES, 4 * 1024 * 1024):
        with running(tmp_path / str(chunk_bytes), chunk_bytes=chunk_bytes) as box:
            assert submit(path, box.endpoint).state == "durable"


def test_plaintext_on_the_loopback_works_too(tmp_path: Path) -> None:
    with running(tmp_path, plaintext=True) as box:
        assert submit(make_file(tmp_path / "a.safetensors"), box.endpoint, None).state == "durable"


def test_the_same_twice_is_had(tmp_path: Path) -> None:
    path = make_file(tmp_path / "cats.safetensors")
    with running(tmp_path) as box:
        submit(path, box.endpoint)
        again = submit(path, box.endpoint)
        assert again.sent == 0
        assert "inbox" in again.state
        assert len(box.submitted) == 1
    with running(tmp_path, known={again.sha256: "folded"}) as box:
        assert submit(path, box.endpoint).state == "folded"


def test_another_file_of_the_same_name_does_not_overwrite(tmp_path: Path) -> None:
    with running(tmp_path) as box:
        one = make_file(tmp_path / "cats.safetensors", seed=1)
        submit(one, box.endpoint)
        first = one.read_bytes()
        result = submit(make_file(one, seed=2), box.endpoint)
        assert result.name == f"cats-{result.sha256[:8]}.safetensors"
        assert (box.root / "inbox" / "cats.safetensors").read_bytes() == first
        assert (box.root / "inbox" / result.name).read_bytes() == one.read_bytes()


@pytest.mark.parametrize("cut", [0, 1, CHUNK, 7 * CHUNK + 3])
def test_goes_on_where_it_was_cut_even_over_a_restart(tmp_path: Path, cut: int) -> None:
    path = make_file(tmp_path / "cats.safetensors")
    content = path.read_bytes()
    part = tmp_path / "state" / "work" / "incoming" / f"{sha256_bytes(content)}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(content[:cut])
    with running(tmp_path) as box:
        result = submit(path, box.endpoint)
        assert result.sent == len(content) - cut
        assert (box.root / "inbox" / result.name).read_bytes() == content


def test_a_tail_that_a_power_cut_took_is_sent_again(tmp_path: Path) -> None:
    path = make_file(tmp_path / "cats.safetensors")
    content = path.read_bytes()
    part = tmp_path / "state" / "work" / "incoming" / f"{sha256_bytes(content)}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(content[: 2 * CHUNK] + bytes(CHUNK))
    with running(tmp_path) as box:
        result = submit(path, box.endpoint)
        assert result.state == "durable"
        assert result.sent >= len(content)
        assert (box.root / "inbox" / result.name).read_bytes() == content


def test_a_file_that_had_arrived_but_was_not_verified_is_finished(tmp_path: Path) -> None:
    path = make_file(tmp_path / "cats.safetensors")
    part = tmp_path / "state" / "work" / "incoming" / f"{sha256_bytes(path.read_bytes())}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(path.read_bytes())
    with running(tmp_path) as box:
        assert submit(path, box.endpoint).sent == 0
        assert box.submitted


def test_a_client_survives_the_daemons_restart(tmp_path: Path) -> None:
    path = make_file(tmp_path / "cats.safetensors", 3000 * CHUNK)
    started, results = threading.Event(), []

    def send(endpoint: str) -> None:
        def progress(done: int, total: int) -> None:
            if done > 100 * CHUNK:
                started.set()

        results.append(submit(path, endpoint, progress=progress))

    with running(tmp_path) as box:
        endpoint = box.endpoint
        thread = threading.Thread(target=send, args=(endpoint,))
        thread.start()
        assert started.wait(10)
        port = endpoint
    with running(tmp_path, bind=port) as box:
        thread.join(20)
        assert [result.state for result in results] == ["durable"]
        assert (box.root / "inbox" / "cats.safetensors").read_bytes() == path.read_bytes()


def test_a_revocation_of_somebody_else_does_not_hurt_a_transfer(tmp_path: Path) -> None:
    path, revoked = make_file(tmp_path / "cats.safetensors", 2000 * CHUNK), False

    with running(tmp_path) as box:

        def progress(done: int, total: int) -> None:
            nonlocal revoked
            if done > 100 * CHUNK and not revoked:
                revoked = True
                (box.keys / "devices" / "device.pub").unlink()

        assert submit(path, box.endpoint, progress=progress).state == "durable"
        assert revoked


def test_wrong_bytes_are_refused_and_thrown_away(tmp_path: Path) -> None:
    data, sha256 = noise(CHUNK), sha256_bytes(b"something else")
    with running(tmp_path) as box, RawClient(box.endpoint, SUBMITTER) as client:
        answer = client.ask(Offer("cats.safetensors", CHUNK, sha256))
        assert answer is not None
        assert answer[0] == Go(sha256, 0, CHUNK, 4)
        answer = client.ask(Chunk(sha256, 0), data)
        assert answer is not None
        assert answer[0] == Ack(sha256, CHUNK)
        answer = client.answer()
        assert answer is not None
        assert isinstance(answer[0], Refuse)
        assert answer[0].code == "digest-mismatch"
        assert not answer[0].retry
        assert list((box.root / "inbox").iterdir()) == []
        assert list((box.root / "work" / "incoming").iterdir()) == []


def test_a_file_over_the_limit_is_refused_before_it_is_sent(tmp_path: Path) -> None:
    with running(tmp_path, max_bundle_bytes=5 * CHUNK) as box:
        with pytest.raises(BadRequest) as raised:
            submit(make_file(tmp_path / "cats.safetensors"), box.endpoint)
        assert raised.value.code == "too-large"


def test_nobody_sends_more_than_was_offered_nor_out_of_order(tmp_path: Path) -> None:
    data = noise(2 * CHUNK)
    sha256 = sha256_bytes(data)
    with running(tmp_path) as box, RawClient(box.endpoint, SUBMITTER) as client:

        def said(request: Offer | Chunk, payload: bytes | None = None) -> object:
            answer = client.ask(request, payload)
            assert answer is not None
            return answer[0]

        assert isinstance(said(Chunk(sha256, 0), data[:10]), Refuse)  # offer first
        assert isinstance(said(Offer("a.safetensors", CHUNK + 5, sha256)), Go)
        assert said(Chunk(sha256, CHUNK), data[:5]) == Go(sha256, 0, CHUNK, 4)  # a hole
        assert said(Chunk(sha256, 0), data[:CHUNK]) == Ack(sha256, CHUNK)
        assert said(Chunk(sha256, 0), data[:CHUNK]) == Ack(sha256, CHUNK)  # a repetition
        refused = said(Chunk(sha256, CHUNK), data[:6])  # one byte too many
        assert isinstance(refused, Refuse)
        assert refused.code == "bad-chunk"
        assert isinstance(said(Chunk(sha256, CHUNK)), Refuse)  # no data at all
        other = said(Offer("a.safetensors", CHUNK + 6, sha256))
        assert isinstance(other, Refuse)
        assert other.code == "size-differs"


def test_two_keys_do_not_write_into_one_transfer(tmp_path: Path) -> None:
    from bus_kit import admit

    admit(tmp_path / "keys" / "submitters", STRANGER)
    sha256 = sha256_bytes(noise(CHUNK))
    with (
        running(tmp_path) as box,
        RawClient(box.endpoint, SUBMITTER) as one,
        RawClient(box.endpoint, STRANGER) as two,
    ):
        assert isinstance((one.ask(Offer("a.safetensors", CHUNK, sha256)) or [None])[0], Go)
        waiting = two.ask(Offer("a.safetensors", CHUNK, sha256))
        assert waiting is not None
        assert type(waiting[0]).__name__ == "Wait"
        intruder = two.ask(Chunk(sha256, 0), b"x" * CHUNK)
        assert intruder is not None
        assert isinstance(intruder[0], Refuse)
        assert (one.ask(Chunk(sha256, 0), noise(CHUNK)) or [None])[0] == Ack(sha256, CHUNK)
        done = one.answer()
        assert done is not None
        assert isinstance(done[0], Durable)
        had = two.ask(Offer("a.safetensors", CHUNK, sha256))
        assert had is not None
        assert isinstance(had[0], Have)


def test_limits_on_unfinished_transfers(tmp_path: Path) -> None:
    with (
        running(tmp_path, max_partials=2, max_partial_bytes=10 * CHUNK) as box,
        RawClient(box.endpoint, SUBMITTER) as client,
    ):

        def code(size: int, seed: int) -> str:
            answer = client.ask(Offer("a.safetensors", size, sha256_bytes(noise(8, seed))))
            assert answer is not None
            return getattr(answer[0], "code", type(answer[0]).__name__)

        assert code(0, 0) == "empty"
        assert code(11 * CHUNK, 1) == "too-many-bytes"
        assert code(4 * CHUNK, 2) == "Go"
        assert code(4 * CHUNK, 3) == "Go"
        assert code(1, 4) == "too-many-partials"


def test_a_full_disk_is_a_refusal_that_may_pass(tmp_path: Path) -> None:
    with running(tmp_path, min_free_bytes=2**60) as box:
        with pytest.raises(Unavailable) as raised:
            submit(make_file(tmp_path / "cats.safetensors"), box.endpoint)
        assert raised.value.code == "disk-full"


def test_a_device_may_not_submit_and_a_stranger_is_told(tmp_path: Path) -> None:
    path = make_file(tmp_path / "cats.safetensors")
    with running(tmp_path) as box:
        with pytest.raises(BadRequest) as denied:
            submit(path, box.endpoint, DEVICE)
        assert denied.value.code == "not-a-submitter"
        with pytest.raises(BadSetup) as refused:
            submit(path, box.endpoint, STRANGER)
        assert refused.value.code == "key-refused"
        assert box.submitted == []


def test_what_cannot_be_sent_is_said_before_connecting(tmp_path: Path) -> None:
    (tmp_path / "empty.safetensors").touch()
    for name, code in (("empty.safetensors", "empty"), ("none.safetensors", "no-file")):
        with pytest.raises(BadCheckpoint) as raised:
            submit(tmp_path / name, "tcp://127.0.0.1:9")
        assert raised.value.code == code


def test_nobody_there_is_a_timeout(tmp_path: Path) -> None:
    path = make_file(tmp_path / "cats.safetensors")
    with pytest.raises(Unavailable) as raised:
        submit_file(path, "tcp://127.0.0.1:9", SUBMITTER, DAEMON.public, timeout_s=0.3)
    assert raised.value.code == "bus-timeout"


def test_the_listener_hears_of_files_after_they_are_durable(tmp_path: Path) -> None:
    with running(tmp_path) as box:
        submit(make_file(tmp_path / "cats.safetensors"), box.endpoint)
        wait_for(lambda: bool(box.submitted))
        assert box.submitted[0].exists()


@pytest.mark.parametrize(("name", "sender"), [("alice", "bus:alice"), ("a\nb c" + "d" * 99, "bus:a-b-c" + "d" * 59)])
def test_the_listener_hears_who_sent_it(tmp_path: Path, name: str, sender: str) -> None:
    somebody = msgspec.structs.replace(new_identity("alice"), name=name)
    folder = tmp_path / "keys" / "submitters"
    folder.mkdir(parents=True)
    (folder / "alice.pub").write_bytes(msgspec.json.encode(somebody.public))
    with running(tmp_path) as box:
        submit(make_file(tmp_path / "cats.safetensors"), box.endpoint, somebody)
        wait_for(lambda: bool(box.senders))
        assert box.senders == [sender]
