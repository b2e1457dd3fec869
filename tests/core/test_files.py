"""Durable files and digests."""

from __future__ import annotations

import hashlib
import os

import numpy as np
import pytest

from foldd.core.digests import TensorDigest, base_digest, sha256_file
from foldd.core.files import build_file, place_directory, point, write_file


def test_write_replaces_and_leaves_nothing_behind(tmp_path):
    write_file(tmp_path / "x", b"old")
    write_file(tmp_path / "x", b"new", mode=0o600)
    assert (tmp_path / "x").read_bytes() == b"new"
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


def test_failed_build_keeps_the_old_file(tmp_path):
    write_file(tmp_path / "x", b"old")

    def build(path):
        path.write_bytes(b"half")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        build_file(tmp_path / "x", build)
    assert (tmp_path / "x").read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


def test_a_file_never_takes_a_pipe_or_device_away(tmp_path):
    os.mkfifo(tmp_path / "x")
    with pytest.raises(FileExistsError, match="no regular file"):
        write_file(tmp_path / "x", b"content")
    assert (tmp_path / "x").is_fifo()
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


def test_file_and_folder_are_synced_before_and_after_the_rename(tmp_path, monkeypatch):
    """The order that makes a rename durable: content, rename, folder."""
    calls = []
    real_sync, real_rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append(os.path.isdir(f"/proc/self/fd/{fd}")) or real_sync(fd))
    monkeypatch.setattr(os, "rename", lambda *a, **k: calls.append("rename") or real_rename(*a, **k))
    write_file(tmp_path / "x", b"content")
    assert calls == [False, "rename", True]


def test_point_moves_in_one_step(tmp_path):
    for target in ("a", "b"):
        point(tmp_path / "current", target)
        assert os.readlink(tmp_path / "current") == target
    assert [entry.name for entry in tmp_path.iterdir()] == ["current"]


def test_directory_replaces_a_half_made_one(tmp_path):
    for name, content in (("old", b"1"), ("new", b"2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(content)
    place_directory(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old" / "file").read_bytes() == b"2"
    assert not (tmp_path / "new").exists()


def test_digests(tmp_path):
    (tmp_path / "x").write_bytes(b"abc" * 1_000_000)
    assert sha256_file(tmp_path / "x") == hashlib.sha256(b"abc" * 1_000_000).hexdigest()


def test_tensor_digest_does_not_depend_on_order_layout_or_precision():
    a, b = np.arange(6, dtype=np.float16).reshape(2, 3), np.ones(2, np.float16)
    expected = base_digest([("a", a.astype(np.float32)), ("b", b.astype(np.float32))])
    assert base_digest([("b", b), ("a", a)]) == expected
    assert base_digest([("b", b), ("a", np.asfortranarray(a))]) == expected
    assert base_digest([("b", b), ("a", a.T)]) != expected
    assert base_digest([("b", b), ("c", a)]) != expected


def test_tensor_digest_demands_name_order():
    digest = TensorDigest()
    digest.add("b", "F32", np.zeros(1))
    with pytest.raises(ValueError, match="order"):
        digest.add("a", "F32", np.zeros(1))


def test_large_tensor_is_digested_in_pieces_like_in_one():
    array = np.random.default_rng(0).standard_normal(3_000_001).astype(np.float32)
    digest = TensorDigest()
    digest.add("x", "F32", array)
    whole = hashlib.sha256(b"x\0F32\x003000001\0" + array.tobytes()).hexdigest()
    assert digest.hexdigest() == whole
