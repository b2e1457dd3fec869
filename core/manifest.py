"""The manifest: the signed, canonical description of a generation that devices trust.

Canonical form: JSON in UTF-8, keys sorted, no blanks, as msgspec writes it. What is signed is
``b"foldd-manifest-1\\0"`` and the canonical bytes of `manifest`. A reader accepts the canonical form only, so that
one manifest has one spelling. docs/formats.md shows one.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from foldd.core.errors import BadManifest
from foldd.core.signatures import Identity, PublicIdentity

MAX_MANIFEST_BYTES = 4 * 1024 * 1024
_DOMAIN = b"foldd-manifest-1\0"


class TaskEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One task that the generation answers: `logits/<task>` has `classes` columns."""

    classes: int
    checkpoint_sha256: str
    names: tuple[str, ...] | None = None  # of the classes


class ArtifactEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`model.onnx`: what to fetch and how to feed it."""

    sha256: str
    bytes: int
    input_shape: tuple[int, ...]  # one sample; the batch is free
    features: int


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One generation, as devices see it."""

    generation: int
    parent: int | None
    base: str
    method: str
    config_digest: str
    tasks: dict[str, TaskEntry]
    artifact: ArtifactEntry
    scores: dict[str, float]
    created: str  # UTC, ISO 8601
    format: int = 1


class SignedManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A manifest with signatures: verify key in hexadecimal → signature in hexadecimal."""

    manifest: Manifest
    signatures: dict[str, str]


def _canonical(value: msgspec.Struct) -> bytes:
    return msgspec.json.encode(value, order="sorted")


def sign_manifest(manifest: Manifest, identity: Identity) -> bytes:
    """The signed manifest as it stands in `manifest.json` and goes over the bus."""
    signature = identity.sign(_DOMAIN + _canonical(manifest)).hex()
    return _canonical(SignedManifest(manifest, {identity.public.verify_key: signature}))


def read_manifest(data: bytes) -> SignedManifest:
    """Parses a manifest strictly; does not look at signatures.

    Raises:
        BadManifest: `manifest-too-large`, `manifest-malformed`.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise BadManifest(
            "manifest-too-large", f"A manifest of {len(data)} bytes came, the limit is {MAX_MANIFEST_BYTES}."
        )
    try:
        signed = msgspec.json.decode(data, type=SignedManifest)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BadManifest(
            "manifest-malformed",
            f"A manifest cannot be read: {error}.",
            why="it was damaged or altered on the way, or made by another version of foldd.",
        ) from error
    if signed.manifest.format != 1:
        raise BadManifest(
            "manifest-malformed",
            f"A manifest has format {signed.manifest.format}, this foldd reads 1.",
            remedy="Upgrade foldd on this device.",
        )
    if _canonical(signed) != data:
        raise BadManifest("manifest-malformed", "A manifest is not in canonical form.", why="it was altered.")
    return signed


def verify_manifest(data: bytes, trusted: Iterable[PublicIdentity]) -> Manifest:
    """The manifest, if one of the trusted identities signed exactly these bytes.

    Raises:
        BadManifest: `manifest-too-large`, `manifest-malformed`, `unknown-signer`, `bad-signature`.
    """
    signed = read_manifest(data)
    known = [identity for identity in trusted if identity.verify_key in signed.signatures]
    if not known:
        raise BadManifest(
            "unknown-signer",
            f"Generation {signed.manifest.generation} is signed by no key that this device trusts.",
            why="another daemon made it, or the daemon has a new key.",
            remedy="Copy the daemon's .pub file to this device if the daemon is yours.",
        )
    message = _DOMAIN + _canonical(signed.manifest)
    for identity in known:
        written = signed.signatures[identity.verify_key]
        try:
            signature = bytes.fromhex(written)
        except ValueError:
            continue
        # Lower case only: one manifest has one spelling.
        if signature.hex() == written and identity.verify(message, signature):
            return signed.manifest
    raise BadManifest(
        "bad-signature",
        f"The signature under generation {signed.manifest.generation} does not fit its content.",
        why="the manifest was altered after it was signed.",
    )
