"""The six ways in which CURVE lets strangers in (facts/daemon.md F6), and that each is closed here."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import zmq
from bus_kit import DAEMON, DEVICE, STRANGER, SUBMITTER, RawClient, admit, publish, running, wait_for

from foldd.core.errors import BadSetup, Unavailable
from foldd.core.signatures import Identity, new_identity
from foldd.core.wire import GetManifest, ManifestIs, Offer, Refuse, check_endpoint, is_local
from foldd.daemon.bus.auth import AllowList, Authenticator
from foldd.daemon.bus.channel import Channel
from foldd.daemon.bus.server import BusServer
from foldd.daemon.bus.settings import BusSettings
from foldd.daemon.bus.sockets import bind_socket, check_plaintext, open_socket

QUIET_S = 0.5  # how long nobody must answer; a handshake on the loopback takes a few milliseconds


def is_answered(endpoint: str, identity: Identity | None, seconds: float = QUIET_S) -> bool:
    with RawClient(endpoint, identity) as client:
        return client.ask(GetManifest(), seconds=seconds) is not None


def test_case_1_nothing_is_bound_without_an_authenticator(tmp_path: Path) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = open_socket(context, zmq.ROUTER, max_data_bytes=1024, window=8)
    never_started = Authenticator(context, {"d": [AllowList(keys=[STRANGER.public])]})
    for authenticator in (None, never_started):
        with pytest.raises(Unavailable) as raised:
            bind_socket(socket, "tcp://127.0.0.1:*", DAEMON, authenticator, "d")
        assert raised.value.code == "authenticator-dead"
    context.destroy(linger=0)


def test_case_2_a_client_without_encryption_is_not_heard(tmp_path: Path) -> None:
    with running(tmp_path) as box:
        assert is_answered(box.endpoint, DEVICE, 5.0)
        assert not is_answered(box.endpoint, None)


def test_case_3_a_dead_authenticator_closes_the_bus(tmp_path: Path) -> None:
    with running(tmp_path) as box:
        authenticator = box.server._authenticator
        assert authenticator is not None
        authenticator._answer = None  # type: ignore[method-assign,assignment]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("threading.excepthook", lambda args: None)
            assert not is_answered(box.endpoint, STRANGER)  # its handshake is what kills the thread
            wait_for(lambda: not box.server.alive)
        assert isinstance(box.server.failure, Unavailable)
        assert box.server.failure.code == "authenticator-dead"
        assert not is_answered(box.endpoint, STRANGER)
        assert not is_answered(box.endpoint, DEVICE)


def test_case_3_even_with_the_authenticator_stopped_libzmq_admits_nobody(tmp_path: Path) -> None:
    """The socket stays open here, as in the moment before the serving loop notices."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    authenticator = Authenticator(context, {"d": [AllowList(keys=[DEVICE.public])]})
    authenticator.start()
    router = open_socket(context, zmq.ROUTER, max_data_bytes=1024, window=8)
    endpoint = bind_socket(router, "tcp://127.0.0.1:*", DAEMON, authenticator, "d")
    authenticator.stop()
    with RawClient(endpoint, STRANGER) as client:
        client.socket.send(b"let me in")
        assert not router.poll(QUIET_S * 1000)
    context.destroy(linger=0)


def test_case_4_only_keys_on_the_list_are_admitted(tmp_path: Path) -> None:
    with running(tmp_path) as box:
        assert is_answered(box.endpoint, SUBMITTER, 5.0)
        assert not is_answered(box.endpoint, STRANGER)
        assert box.server.counts["rejected"] > 0
        admit(box.keys / "devices", STRANGER)
        wait_for(lambda: STRANGER.public.curve_public in box.server._devices)
        with RawClient(box.endpoint, STRANGER) as client:
            assert client.ask(GetManifest()) is not None


def test_case_5_a_revoked_key_loses_its_live_session_and_case_6_gets_no_new_one(tmp_path: Path) -> None:
    other = new_identity("other")
    admit(tmp_path / "keys" / "devices", other)
    with running(tmp_path) as box, RawClient(box.endpoint, other) as live, RawClient(box.endpoint, DEVICE) as bystander:
        for client in (live, bystander):
            assert client.ask(GetManifest()) is not None
        before = box.server._router
        (box.keys / "devices" / "other.pub").unlink()
        wait_for(lambda: box.server._router is not before and box.server._router is not None)
        assert live.ask(GetManifest(), seconds=QUIET_S) is None
        assert not is_answered(box.endpoint, other)
        assert bystander.ask(GetManifest()) is not None  # connected again by itself


def test_a_revoked_key_is_refused_before_its_session_is_dropped(tmp_path: Path) -> None:
    with running(tmp_path, allow_list_poll_s=1e6) as box, RawClient(box.endpoint, DEVICE) as client:
        assert client.ask(GetManifest()) is not None
        (box.keys / "devices" / "device.pub").unlink()
        box.server._devices.reload()
        answer = client.ask(GetManifest())
        assert answer is not None
        assert answer[0] == Refuse("", "not-a-device", "This key may not fetch generations.")


def test_each_list_opens_its_own_door_only(tmp_path: Path) -> None:
    with running(tmp_path) as box:
        publish(box.root, 1, b"artifact")
        offer = Offer("a.safetensors", 1, "0" * 64)
        with RawClient(box.endpoint, DEVICE) as device, RawClient(box.endpoint, SUBMITTER) as submitter:
            answer = device.ask(offer)
            assert answer is not None
            assert isinstance(answer[0], Refuse)
            assert answer[0].code == "not-a-submitter"
            answer = submitter.ask(GetManifest())
            assert answer is not None
            assert isinstance(answer[0], Refuse)
            assert answer[0].code == "not-a-device"
            answer = device.ask(GetManifest())
            assert answer is not None
            assert isinstance(answer[0], ManifestIs)
        with RawClient(box.server.announce_endpoint, SUBMITTER, kind=zmq.SUB) as listener:
            assert listener.socket.poll(QUIET_S * 1000) == 0


def test_a_refused_key_is_told_so_at_once(tmp_path: Path) -> None:
    with running(tmp_path) as box, Channel(box.endpoint, STRANGER, DAEMON.public) as channel:
        with pytest.raises(BadSetup) as raised:
            channel.receive(10.0)
        assert raised.value.code == "key-refused"


def test_a_server_with_another_key_gets_nothing(tmp_path: Path) -> None:
    with running(tmp_path) as box, RawClient(box.endpoint, DEVICE, STRANGER) as client:
        assert client.ask(GetManifest(), seconds=QUIET_S) is None


def test_plaintext_is_for_the_loopback(tmp_path: Path) -> None:
    with running(tmp_path, plaintext=True) as box:
        assert is_answered(box.endpoint, None, 5.0)
    for bind, announce in (("tcp://*:0", ""), ("", "tcp://0.0.0.0:*")):
        server = BusServer(
            BusSettings(bind=bind, announce=announce, plaintext=True),
            None,
            tmp_path,
            lambda path, sender: None,
            lambda: None,
        )
        with pytest.raises(BadSetup) as raised:
            server.start()
        assert raised.value.code == "plaintext-not-loopback"
    with pytest.raises(BadSetup) as raised:
        Channel("tcp://192.0.2.1:5757", None, None)
    assert raised.value.code == "plaintext-not-loopback"


@pytest.mark.parametrize(
    ("endpoint", "local"),
    [
        ("tcp://127.0.0.1:1", True), ("tcp://127.9.9.9:*", True), ("tcp://[::1]:1", True), ("tcp://localhost:1", True),
        ("ipc:///run/foldd", True), ("inproc://x", True),
        ("tcp://*:1", False), ("tcp://0.0.0.0:1", False), ("tcp://eth0:1", False), ("tcp://[::]:1", False),
        ("tcp://127.0.0.1.example.org:1", False), ("tcp://192.168.1.2:1", False), ("tcp://localhost.evil:1", False),
        ("epgm://127.0.0.1;224.0.0.1:1", False), ("tcp://192.168.1.2:1;127.0.0.1:2", False),
        ("tcp://[::1", False), ("", False),
    ],
)  # fmt: skip
def test_what_counts_as_loopback(endpoint: str, local: bool) -> None:
    assert is_local(endpoint) is local
    if not local:
        with pytest.raises(BadSetup):
            check_plaintext(endpoint)


@pytest.mark.parametrize(
    ("endpoint", "connects", "binds"),
    [
        ("tcp://box:5757", True, True), ("tcp://[::1]:65535", True, True), ("ipc:///run/x", True, True),
        ("inproc://x", True, True), ("tcp://*:1", False, True), ("tcp://127.0.0.1:*", False, True),
        ("tcp://127.0.0.1:0", False, True), ("tcp://127.0.0.1:65536", False, False), ("tcp://box", False, False),
        ("tcp://127.0.0.1:99999", False, False), ("tcp://127.0.0.1:-1", False, False), ("tcp://:1", False, False),
        ("tcp://127.0.0.1:1000000", False, False), ("tcp://127.0.0.1:٣", False, False), ("ipc://", False, False),
        ("127.0.0.1:5757", False, False), ("udp://127.0.0.1:1", False, False), ("", False, False),
    ],
)  # fmt: skip
def test_what_is_an_endpoint(endpoint: str, connects: bool, binds: bool) -> None:
    for bind, right in ((False, connects), (True, binds)):
        with contextlib.nullcontext() if right else pytest.raises(BadSetup) as raised:
            check_endpoint(endpoint, bind=bind)
        assert right or raised.value.code == "bad-endpoint"


def test_endpoints_are_checked_before_keys(tmp_path: Path) -> None:
    """Who forgot `tcp://` is told so, not that it is no loopback."""
    with pytest.raises(BadSetup, match=r"Write tcp://127\.0\.0\.1:5757"):
        Channel("127.0.0.1:5757", None, None)


def test_a_bus_that_admits_nobody_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with running(tmp_path):
        assert "admits nobody" not in caplog.text
    with running(tmp_path, submitters="", devices=""):
        assert "admits nobody" in caplog.text


def test_no_identity_no_bus(tmp_path: Path) -> None:
    with pytest.raises(BadSetup) as raised:
        BusServer(BusSettings(bind="tcp://127.0.0.1:*"), None, tmp_path, lambda path, sender: None, lambda: None)
    assert raised.value.code == "no-identity"


def test_a_taken_port_is_the_operators_error(tmp_path: Path) -> None:
    with running(tmp_path) as box, pytest.raises(BadSetup) as raised, running(tmp_path, bind=box.endpoint):
        pass
    assert raised.value.code == "cannot-bind"


def test_a_broken_key_file_stops_the_start_but_not_a_running_bus(tmp_path: Path) -> None:
    folder = admit(tmp_path / "list", DEVICE, SUBMITTER)
    running_list = AllowList(folder)
    (folder / "device.pub").write_text("{")
    with pytest.raises(BadSetup) as raised:
        AllowList(folder)
    assert raised.value.code == "bad-key"
    assert running_list.reload() == {DEVICE.public.curve_public}
    assert SUBMITTER.public.curve_public in running_list
    with pytest.raises(BadSetup) as raised:
        AllowList(tmp_path / "nowhere")
    assert raised.value.code == "no-allow-list"


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\x00", b'{"name":"x\xff"}', b'{"name":"x","verify_key":"zz","curve_public":"zz"}']
)
def test_a_broken_key_file_admits_nobody_and_the_bus_goes_on(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with running(tmp_path) as box:
        other, folder = new_identity("other"), box.keys / "devices"
        (folder / "broken.pub").write_bytes(content)
        admit(folder, other)  # later in the same folder
        wait_for(lambda: other.public.curve_public in box.server._devices)
        assert len(box.server._devices) == 2
        assert is_answered(box.endpoint, other, 5.0)
        assert box.server.alive
    assert "broken.pub" in caplog.text


def test_a_file_that_cannot_be_looked_at_is_complained_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = admit(tmp_path / "list", DEVICE)
    allowed = AllowList(folder)
    (folder / "gone.pub").symlink_to(tmp_path / "nowhere")
    for _ in range(3):
        allowed.reload()
    admit(folder, SUBMITTER)
    allowed.reload()
    assert caplog.text.count("gone.pub") == 1
    assert len(allowed) == 2
