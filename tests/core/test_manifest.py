"""Manifests: canonical, signed, and refused after any change."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foldd.core.errors import BadManifest, BadSetup
from foldd.core.manifest import ArtifactEntry, Manifest, TaskEntry, read_manifest, sign_manifest, verify_manifest
from foldd.core.signatures import new_identity, read_allow_list, read_identity, read_public, write_identity

ALICE, MALLORY = new_identity("alice"), new_identity("mallory")
MANIFEST = Manifest(
    generation=3, parent=2, base="aa", method="otmf", config_digest="bb",
    tasks={"zeta": TaskEntry(2, "cc", ("x", "ÿ")), "alpha": TaskEntry(3, "dd")},
    artifact=ArtifactEntry("ee", 10, (1, 8, 8), 12), scores={"parity": 1.25e-7}, created="2026-01-01T00:00:00.000Z",
)  # fmt: skip
SIGNED = sign_manifest(MANIFEST, ALICE)


def code_of(data: bytes, *trusted) -> str:
    with pytest.raises(BadManifest) as caught:
        verify_manifest(data, [identity.public for identity in trusted])
    return caught.value.code


def test_round_trip():
    assert verify_manifest(SIGNED, [MALLORY.public, ALICE.public]) == MANIFEST


def test_signing_is_deterministic_and_sorted():
    assert sign_manifest(MANIFEST, ALICE) == SIGNED
    content = json.loads(SIGNED)["manifest"]
    assert list(content) == sorted(content)
    assert list(content["tasks"]) == ["alpha", "zeta"]


@given(position=st.integers(0, len(SIGNED) - 1), bit=st.integers(0, 7))
def test_every_flipped_bit_is_refused(position, bit):
    data = bytearray(SIGNED)
    data[position] ^= 1 << bit
    assert code_of(bytes(data), ALICE) in {"manifest-malformed", "bad-signature", "unknown-signer"}


def test_unknown_signer():
    assert code_of(SIGNED, MALLORY) == "unknown-signer"


def test_signature_under_another_name():
    """Mallory's signature under Alice's key."""
    forged = sign_manifest(MANIFEST, MALLORY)
    data = forged.replace(MALLORY.public.verify_key.encode(), ALICE.public.verify_key.encode())
    assert data != forged
    assert code_of(data, ALICE) == "bad-signature"


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b"\xff\xfe", b"[" * 100_000, SIGNED + b" ", SIGNED.replace(b",", b", ", 1)],
    ids=["empty", "no-fields", "not-utf8", "deep", "trailing", "blank"],
)
def test_other_spellings(data):
    assert code_of(data, ALICE) == "manifest-malformed"


def test_unknown_field():
    content = json.loads(SIGNED)
    content["manifest"]["extra"] = 1
    assert code_of(msgspec.json.encode(content, order="sorted"), ALICE) == "manifest-malformed"


def test_too_large():
    assert code_of(b" " * (4 * 1024 * 1024 + 1), ALICE) == "manifest-too-large"


def test_future_format_is_refused_by_name():
    content = json.loads(SIGNED)
    content["manifest"]["format"] = 2
    with pytest.raises(BadManifest, match="format 2"):
        read_manifest(json.dumps(content).encode())


def test_key_files(tmp_path):
    secret, public = write_identity(ALICE, tmp_path / "keys")
    assert read_identity(secret) == ALICE
    assert read_public(public) == ALICE.public
    assert secret.stat().st_mode & 0o777 == 0o600
    assert b"signing_seed" not in public.read_bytes()
    with pytest.raises(BadSetup, match="exists"):
        write_identity(ALICE, tmp_path / "keys")
    assert read_allow_list(tmp_path / "keys") == [ALICE.public]


def test_secret_key_that_others_can_read_is_refused(tmp_path):
    secret, _ = write_identity(ALICE, tmp_path)
    secret.chmod(0o644)
    with pytest.raises(BadSetup) as caught:
        read_identity(secret)
    assert caught.value.code == "key-readable"


def test_broken_key_in_an_allow_list_is_an_error_not_a_gap(tmp_path):
    (tmp_path / "x.pub").write_text("{}")
    with pytest.raises(BadSetup) as caught:
        read_allow_list(tmp_path)
    assert caught.value.code == "bad-key"
