"""The device's store: what is verified stays, what is older is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from runtime_kit import DAEMON, make_manifest, publish

from foldd.core.errors import BadManifest, BadSetup
from foldd.core.manifest import sign_manifest
from foldd.core.signatures import new_identity
from foldd.runtime.store import Store


def put(store: Store, folder: Path) -> None:
    data, model = (folder / "manifest.json").read_bytes(), (folder / "model.onnx").read_bytes()
    manifest = store.admit(data)
    assert manifest is not None
    if (done := store.begin(manifest)) < len(model):
        store.write(manifest, done, model[done:])
    store.commit(manifest, data)


def make_store(tmp_path: Path, **how: int) -> Store:
    return Store(tmp_path / "device", [DAEMON.public], **how)


def test_keeps_what_it_verified(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    folder = publish(tmp_path / "daemon", 7)
    put(store, folder)
    current = store.root / "current"
    assert (current / "model.onnx").read_bytes() == (folder / "model.onnx").read_bytes()
    assert (current / "manifest.json").read_bytes() == (folder / "manifest.json").read_bytes()
    assert Store(store.root, [DAEMON.public]).highest == 7
    assert store.admit((folder / "manifest.json").read_bytes()) is None


def test_an_older_generation_is_refused_even_after_a_restart_and_a_moved_link(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    folders = [publish(tmp_path / "daemon", n) for n in (1, 2, 3)]
    put(store, folders[0])
    put(store, folders[2])
    (store.root / "current").unlink()
    (store.root / "current").symlink_to("generations/000001")
    store = Store(store.root, [DAEMON.public])
    for folder in folders[1:]:
        with pytest.raises(BadManifest) as raised:
            store.admit((folder / "manifest.json").read_bytes())
        assert raised.value.code == "generation-not-rising"


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes({"flipped": bytes(content), "cut": bytes(content[:-1]), "empty": b""}.get(how, b"{"))
    if how == "missing":
        path.unlink()


@pytest.mark.parametrize("how", ["flipped", "cut", "empty", "garbage", "missing"])
@pytest.mark.parametrize("name", ["manifest.json", "model.onnx"])
def test_a_damaged_generation_is_fetched_again_and_nothing_else_gets_in(tmp_path: Path, name: str, how: str) -> None:
    folders = [publish(tmp_path / "daemon", n) for n in (1, 2, 3)]
    store = make_store(tmp_path)
    put(store, folders[0])
    put(store, folders[2])
    damage(store.root / "current" / name, how)
    store = make_store(tmp_path)
    assert store.highest == 3
    for folder in (*folders[:2], publish(tmp_path / "other", 3, value=9.0)):
        with pytest.raises(BadManifest) as raised:
            store.admit((folder / "manifest.json").read_bytes())
        assert raised.value.code == "generation-not-rising"
    put(store, folders[2])
    assert store.admit((folders[2] / "manifest.json").read_bytes()) is None
    for part in ("manifest.json", "model.onnx"):
        assert (store.root / "current" / part).read_bytes() == (folders[2] / part).read_bytes()
    assert make_store(tmp_path).highest == 3


@pytest.mark.parametrize("name", ["manifest.json", "model.onnx"])
def test_the_next_generation_mends_a_damaged_one(tmp_path: Path, name: str) -> None:
    store = make_store(tmp_path)
    put(store, publish(tmp_path / "daemon", 1))
    damage(store.root / "current" / name, "cut")
    store = make_store(tmp_path)
    put(store, publish(tmp_path / "daemon", 2))
    assert store.highest == 2


def test_a_number_that_was_not_signed_does_not_count(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    put(store, publish(tmp_path / "daemon", 1))
    manifest = store.root / "current" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"generation":1', b'"generation":9'))
    assert b'"generation":9' in manifest.read_bytes()
    assert store.highest == 1


def test_an_artifact_is_read_once_per_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, looked = make_store(tmp_path), []
    folder = publish(tmp_path / "daemon", 1)
    put(store, folder)
    monkeypatch.setattr("foldd.runtime.store.check_artifact", lambda path, manifest: looked.append(path))
    store = make_store(tmp_path)
    for _ in range(3):
        assert store.admit((folder / "manifest.json").read_bytes()) is None
    assert len(looked) == 1


def test_the_same_number_with_another_content_is_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    put(store, publish(tmp_path / "daemon", 3))
    with pytest.raises(BadManifest) as raised:
        store.admit((publish(tmp_path / "other", 3, value=9.0) / "manifest.json").read_bytes())
    assert raised.value.code == "generation-not-rising"


def test_every_flipped_byte_of_a_manifest_is_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    data = (publish(tmp_path / "daemon", 1) / "manifest.json").read_bytes()
    codes = set()
    for index in range(len(data)):
        with pytest.raises(BadManifest) as raised:
            store.admit(data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :])
        codes.add(raised.value.code)
    assert codes == {"manifest-malformed", "unknown-signer", "bad-signature"}


def test_a_swapped_artifact_is_refused_and_thrown_away(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    one, two = publish(tmp_path / "daemon", 1), publish(tmp_path / "daemon", 2)
    put(store, one)
    data = (two / "manifest.json").read_bytes()
    manifest = store.admit(data)
    assert manifest is not None
    other = bytearray((two / "model.onnx").read_bytes())
    other[-1] ^= 1
    store.write(manifest, store.begin(manifest), bytes(other))
    with pytest.raises(BadManifest) as raised:
        store.commit(manifest, data)
    assert raised.value.code == "artifact-digest"
    assert store.begin(manifest) == 0
    current = store.current()
    assert current is not None
    assert current.generation == store.highest == 1


def test_more_or_less_than_was_signed_is_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    folder = publish(tmp_path / "daemon", 1)
    data, model = (folder / "manifest.json").read_bytes(), (folder / "model.onnx").read_bytes()
    manifest = store.admit(data)
    assert manifest is not None
    store.begin(manifest)
    with pytest.raises(BadManifest) as raised:
        store.write(manifest, 0, model + b"x")
    assert raised.value.code == "artifact-size"
    store.write(manifest, 0, model[:-1])
    with pytest.raises(BadManifest) as raised:
        store.commit(manifest, data)
    assert raised.value.code == "artifact-size"


def test_goes_on_where_it_was_cut(tmp_path: Path) -> None:
    folder = publish(tmp_path / "daemon", 1)
    data, model = (folder / "manifest.json").read_bytes(), (folder / "model.onnx").read_bytes()
    store = make_store(tmp_path)
    manifest = store.admit(data)
    assert manifest is not None
    store.write(manifest, store.begin(manifest), model[:100])
    store = make_store(tmp_path)
    assert store.begin(manifest) == 100
    store.write(manifest, 100, model[100:])
    store.commit(manifest, data)
    assert store.highest == 1


def test_an_artifact_that_is_here_under_another_number_is_not_fetched(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    folder = publish(tmp_path / "daemon", 1)
    put(store, folder)
    data = sign_manifest(make_manifest(folder / "model.onnx", 2), DAEMON)
    manifest = store.admit(data)
    assert manifest is not None
    assert store.begin(manifest) == manifest.artifact.bytes
    store.commit(manifest, data)
    assert store.highest == 2


def test_keeps_the_last_generations_only(tmp_path: Path) -> None:
    store = make_store(tmp_path, keep=2)
    for generation in (1, 2, 3, 4):
        put(store, publish(tmp_path / "daemon", generation))
    assert sorted(p.name for p in (store.root / "generations").iterdir()) == ["000003", "000004"]
    assert list((store.root / "incoming").iterdir()) == []


def test_a_stranger_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadManifest) as raised:
        make_store(tmp_path).admit(
            (publish(tmp_path / "daemon", 1, identity=new_identity("mallory")) / "manifest.json").read_bytes()
        )
    assert raised.value.code == "unknown-signer"


def test_a_guard_that_cannot_be_read_is_not_ignored(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    (store.root / "highest.json").write_text("{")
    with pytest.raises(BadSetup) as raised:
        make_store(tmp_path)
    assert raised.value.code == "broken-store"
