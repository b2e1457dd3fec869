"""Identities: one file with an Ed25519 key that signs manifests and an X25519 key that CURVE encrypts with.

`foldd keygen NAME` writes NAME.key (secret, mode 0600) and NAME.pub. A daemon, a device and a submitter each
have one; each side keeps the other sides' `.pub` files in folders that are its allow-lists.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec
from nacl.exceptions import BadSignatureError
from nacl.public import PrivateKey
from nacl.signing import SigningKey, VerifyKey

from foldd.core.errors import BadSetup
from foldd.core.files import write_file

T = TypeVar("T", "Identity", "PublicIdentity")


class PublicIdentity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What others may know: a name and two public keys, 32 bytes each, in hexadecimal."""

    name: str
    verify_key: str  # Ed25519
    curve_public: str  # X25519

    def verify(self, message: bytes, signature: bytes) -> bool:
        """Whether this identity signed the message."""
        try:
            VerifyKey(bytes.fromhex(self.verify_key)).verify(message, signature)
        except (BadSignatureError, ValueError):
            return False
        return True


class Identity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A secret identity."""

    name: str
    signing_seed: str
    curve_secret: str

    @property
    def public(self) -> PublicIdentity:
        verify_key = SigningKey(bytes.fromhex(self.signing_seed)).verify_key
        curve = PrivateKey(bytes.fromhex(self.curve_secret)).public_key
        return PublicIdentity(self.name, bytes(verify_key).hex(), bytes(curve).hex())

    def sign(self, message: bytes) -> bytes:
        """The 64-byte Ed25519 signature of a message."""
        return SigningKey(bytes.fromhex(self.signing_seed)).sign(message).signature


def new_identity(name: str) -> Identity:
    return Identity(name, bytes(SigningKey.generate()).hex(), bytes(PrivateKey.generate()).hex())


def write_identity(identity: Identity, folder: Path) -> tuple[Path, Path]:
    """Writes NAME.key (0600) and NAME.pub.

    Raises:
        BadSetup: `key-exists`: an existing key, secret or public, is never overwritten.
    """
    secret, public = folder / f"{identity.name}.key", folder / f"{identity.name}.pub"
    for path in (secret, public):
        if path.exists():
            raise BadSetup(
                "key-exists",
                f"{path} exists.",
                why="keygen was run before, or this is a folder of others' keys; whoever trusts that key would no "
                "longer know its owner.",
                remedy="Choose another name, or remove the old key, .key and .pub, first if it is to be replaced.",
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_file(secret, msgspec.json.encode(identity) + b"\n", mode=0o600)
    write_file(public, msgspec.json.encode(identity.public) + b"\n")
    return secret, public


def read_identity(path: Path) -> Identity:
    """Reads a secret key file.

    Raises:
        BadSetup: missing, unreadable, malformed, or readable by others than its owner.
    """
    identity = _read(path, Identity)
    if path.stat().st_mode & 0o077:
        raise BadSetup(
            "key-readable", f"{path} can be read by other users.", remedy=f"Run `chmod 600 {path}`, or make a new key."
        )
    return identity


def read_public(path: Path) -> PublicIdentity:
    """Reads a `.pub` file.

    Raises:
        BadSetup: missing, unreadable or malformed.
    """
    return _read(path, PublicIdentity)


def read_allow_list(folder: Path) -> list[PublicIdentity]:
    """All `.pub` files of a folder, in name order; a broken one is an error, never skipped."""
    if not folder.is_dir():
        raise BadSetup(
            "no-allow-list",
            f"{folder} is not a folder.",
            remedy="Create it and copy the .pub files of those to be admitted into it.",
        )
    return [read_public(path) for path in sorted(folder.glob("*.pub"))]


def _read(path: Path, kind: type[T]) -> T:
    try:
        identity = msgspec.json.decode(path.read_bytes(), type=kind)
        for key in msgspec.structs.astuple(identity)[1:]:
            if len(bytes.fromhex(key)) != 32:
                raise ValueError("a key is not 32 bytes long")
    except OSError as error:
        raise BadSetup(
            "no-key", f"{path} cannot be read: {error.strerror}.", remedy="Make a key with `foldd keygen`."
        ) from error
    except (msgspec.MsgspecError, ValueError) as error:
        raise BadSetup(
            "bad-key", f"{path} is no {kind.__name__} file: {error}.", remedy="Make a key with `foldd keygen`."
        ) from error
    return identity
