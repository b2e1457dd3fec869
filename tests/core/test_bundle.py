"""The bundle: one test per way that a file may be wrong, named after it, and the round trip of what is right."""

from __future__ import annotations

import contextlib
import json
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from foldd.core import bundle as bundle_module
from foldd.core import bundle_fields
from foldd.core.base_spec import BaseSpec, TensorSpec
from foldd.core.bundle import Head, open_bundle, write_bundle
from foldd.core.errors import BadCheckpoint
from foldd.core.roles import Role
from foldd.core.tensorfile import MAX_HEADER_BYTES, header_length, open_tensors, write_tensors

SPEC = BaseSpec(
    digest="ab" * 32,
    tensors={
        "a.weight": TensorSpec((4, 3), Role.MATRIX),
        "a.bias": TensorSpec((4,), Role.BIAS),
        "b.weight": TensorSpec((4, 3), Role.MATRIX, tied_to="a.weight"),
        "bn.count": TensorSpec((), Role.COUNTER),
    },
    input_shape=(3,),
    features=4,
    head="fc",
    ignored=("extra",),
)
HEAD = Head(np.ones((2, 4), np.float32), np.zeros(2, np.float32))


def weights():
    return {"a.weight": np.arange(12, dtype=np.float32).reshape(4, 3), "a.bias": np.ones(4, np.float32)}


def raw(path, *, drop=(), metadata=None, **changes):
    """A valid bundle with changes, written without foldd's writer."""
    tensors = {f"model/{name}": array for name, array in weights().items()}
    tensors |= {"head/weight": HEAD.weight, "head/bias": HEAD.bias}
    tensors |= {name.replace("__", "/"): array for name, array in changes.items()}
    for name in drop:
        del tensors[name]
    meta = {"foldd.format": "1", "foldd.task": "digits", "foldd.base": SPEC.digest} | (metadata or {})
    save_file(tensors, path, {key: value for key, value in meta.items() if value is not None})
    return path


EXPLAINED = {"bad-metadata", "metadata-too-large", "wrong-calibration"}  # why, and what to do


def code_of(path, **options):
    with pytest.raises(BadCheckpoint) as caught:
        open_bundle(path, SPEC, **options)
    assert caught.value.what
    assert not caught.value.retry
    if caught.value.code in EXPLAINED:
        assert caught.value.remedy
    return caught.value.code


def test_round_trip(tmp_path):
    path = tmp_path / "digits.safetensors"
    inputs, labels = np.ones((5, 3), np.float32), np.array([0, 1, 1, 0, 1])
    write_bundle(
        path, weights(), HEAD, task="digits", base=SPEC, inputs=inputs, labels=labels, samples=9, classes=("x", "y")
    )
    read = open_bundle(path, SPEC)
    assert (read.task, read.samples, read.classes, read.is_delta, read.is_plain) == (
        "digits",
        9,
        ("x", "y"),
        False,
        False,
    )
    assert np.array_equal(read.parameters["a.weight"].float32(), weights()["a.weight"])
    assert np.array_equal(read.inputs, inputs)
    assert np.array_equal(read.labels, labels)
    assert np.array_equal(read.head.weight, HEAD.weight)


def test_equal_content_is_equal_bytes(tmp_path):
    """A checkpoint packed twice has one digest, and is folded once; safetensors' own writer shuffles metadata."""
    for name in ("a", "b", "c", "d"):
        write_bundle(tmp_path / name, weights(), HEAD, task="digits", base=SPEC, samples=9, classes=("x", "y"))
    assert len({(tmp_path / name).read_bytes() for name in ("a", "b", "c", "d")}) == 1


def test_own_writer_is_read_by_the_library(tmp_path):
    arrays = {
        "half": np.arange(3, dtype=np.float16), "é": np.ones((2, 2)), "int": np.array(7, np.int64),
        "empty": np.zeros((0, 3), np.float32), "turned": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    }  # fmt: skip
    write_tensors(tmp_path / "x", arrays, {"b": "2", "a": "ü"})
    read = load_file(tmp_path / "x")
    assert {name: (a.dtype, a.tolist()) for name, a in read.items()} == {
        n: (a.dtype, a.tolist()) for n, a in arrays.items()
    }


def test_writer_leaves_no_file_when_the_bundle_would_be_refused(tmp_path):
    with pytest.raises(BadCheckpoint):
        write_bundle(tmp_path / "x.safetensors", weights(), HEAD, task="../evil", base=SPEC)
    assert list(tmp_path.iterdir()) == []


def test_half_precision_is_read_as_float32(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {f"model/{n}": a.astype(np.float16) for n, a in weights().items()}
    tensors |= {"head/weight": HEAD.weight.astype(np.float16), "head/bias": HEAD.bias.astype(np.float16)}
    save_file(tensors, path, {"foldd.format": "1", "foldd.task": "t", "foldd.base": SPEC.digest})
    read = open_bundle(path, SPEC)
    assert read.parameters["a.weight"].float32().dtype == np.float32
    assert np.array_equal(read.parameters["a.weight"].float32(), weights()["a.weight"])


def test_bfloat16_is_read_as_float32(tmp_path):
    """numpy has no bfloat16; torch's own conversion is the independent answer."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch

    values = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_torch({"a": values}, tmp_path / "x.safetensors")
    read = open_tensors(tmp_path / "x.safetensors").tensors["a"]
    assert np.array_equal(read.float32(), values.float().numpy())


def test_tied_alias_may_come_instead_of_the_canonical_name(tmp_path):
    path = raw(tmp_path / "x.safetensors", **{"model__b.weight": weights()["a.weight"]}, drop=["model/a.weight"])
    assert set(open_bundle(path, SPEC).parameters) == {"a.weight", "a.bias"}


def test_tied_tensors_that_differ(tmp_path):
    path = raw(tmp_path / "x.safetensors", **{"model__b.weight": np.zeros((4, 3), np.float32)})
    assert code_of(path) == "untied"


def test_counter_and_ignored_tensors_are_accepted_and_dropped(tmp_path):
    path = raw(tmp_path / "x.safetensors", **{"model__bn.count": np.array(7), "model__extra": np.ones(9, np.float32)})
    assert set(open_bundle(path, SPEC).parameters) == {"a.weight", "a.bias"}


def test_plain_checkpoint(tmp_path):
    save_file(weights() | {"fc.weight": HEAD.weight, "fc.bias": HEAD.bias}, tmp_path / "birds.safetensors")
    read = open_bundle(tmp_path / "birds.safetensors", SPEC)
    assert (read.task, read.is_plain, read.inputs) == ("birds", True, None)


def test_plain_checkpoint_is_named_by_the_file_that_was_dropped(tmp_path):
    save_file(weights() | {"fc.weight": HEAD.weight}, tmp_path / "claimed")
    assert open_bundle(tmp_path / "claimed", SPEC, name="birds.safetensors").task == "birds"


WRONG_FORM = {
    "unknown-format": {"metadata": {"foldd.format": "2"}},
    "wrong-base": {"metadata": {"foldd.base": "cd" * 32}},
    "bad-task-name": {"metadata": {"foldd.task": "../../etc"}},
    "no-metadata": {"metadata": {"foldd.format": None}},
    "missing-tensors": {"drop": ["model/a.bias"]},
    "no-head": {"drop": ["head/weight"]},
    "no-parameters": {"drop": ["model/a.weight", "model/a.bias"]},
    "mixed-parameters": {"delta__a.bias": np.ones(4, np.float32)},
    "unknown-tensors": {"model__nope": np.ones(1, np.float32)},
    "wrong-shape": {"model__a.bias": np.ones(5, np.float32)},
    "wrong-dtype": {"model__a.bias": np.ones(4, np.int64)},
    "wrong-head": {"head__weight": np.ones((2, 5), np.float32)},
    "wrong-calibration": {"calibration__inputs": np.ones((5, 4), np.float32)},
    "bad-metadata": {"metadata": {"foldd.classes": '["only one"]'}},
    "content-mismatch": {"metadata": {"foldd.content": "00" * 32}},
}


@pytest.mark.parametrize(
    ("name", "tensors", "words"),
    [
        ("t", {"base_model.a.lora_A.weight": (2, 3)}, "merge_and_unload"),
        ("t", {"module.a.weight": (4, 3)}, "a prefix such as `module.`"),
        ("big-00001-of-00002.safetensors", {"a.weight": (4, 3)}, "foldd merge big.safetensors.index.json"),
        ("t", {"a.weight": (4, 3)}, "Save every weight and buffer"),
    ],
)
def test_names_that_are_not_the_bases_tell_the_likely_cause(tmp_path, name, tensors, words):
    save_file({tensor: np.ones(shape, np.float32) for tensor, shape in tensors.items()}, tmp_path / "bundle")
    with pytest.raises(BadCheckpoint, match=words):
        open_bundle(tmp_path / "bundle", SPEC, name=name)


def test_errors_name_the_file_that_was_dropped(tmp_path, monkeypatch):
    """In its work folder every claimed file is called `bundle`."""
    whole = raw(tmp_path / "bundle").read_bytes()
    for content in (b"hello", whole[:-3], struct.pack("<Q", MAX_HEADER_BYTES + 1) + b" " * (MAX_HEADER_BYTES + 100)):
        (tmp_path / "bundle").write_bytes(content)
        with pytest.raises(BadCheckpoint, match=r"^birds\.safetensors"):
            open_bundle(tmp_path / "bundle", SPEC, name="birds.safetensors")
    (tmp_path / "bundle").write_bytes(whole)
    for limit in ("MAX_BUNDLE_BYTES", "MAX_METADATA_BYTES"):
        monkeypatch.setattr(bundle_module, limit, 1)
        with pytest.raises(BadCheckpoint, match=r"^birds\.safetensors"):
            open_bundle(tmp_path / "bundle", SPEC, name="birds.safetensors")
        monkeypatch.undo()


@pytest.mark.parametrize("code", WRONG_FORM)
def test_wrong_form(tmp_path, code):
    assert code_of(raw(tmp_path / "x.safetensors", **WRONG_FORM[code])) == code


@pytest.mark.parametrize(
    "metadata",
    [{"foldd.samples": "-1"}, {"foldd.samples": "9" * 40}, {"foldd.samples": "٣"}, {"foldd.classes": "[" * 5000}],
)
def test_hostile_metadata(tmp_path, metadata):
    assert code_of(raw(tmp_path / "x.safetensors", metadata=metadata)) == "bad-metadata"


@pytest.mark.parametrize("labels", [np.array([0, 2]), np.array([-1, 0]), np.array([0.0, 1.0]), np.array([0])])
def test_wrong_labels(tmp_path, labels):
    path = raw(tmp_path / "x.safetensors", calibration__inputs=np.ones((2, 3), np.float32), calibration__labels=labels)
    assert code_of(path) == "wrong-calibration"


@pytest.mark.parametrize(
    ("limit", "code"),
    [("MAX_BUNDLE_BYTES", "too-large"), ("MAX_METADATA_BYTES", "metadata-too-large"), ("MAX_CLASSES", "wrong-head")],
)
def test_size_caps(tmp_path, monkeypatch, limit, code):
    path = raw(tmp_path / "x.safetensors")
    monkeypatch.setattr(bundle_module if hasattr(bundle_module, limit) else bundle_fields, limit, 1)
    assert code_of(path) == code


def test_not_safetensors(tmp_path):
    (tmp_path / "x").write_bytes(b"hello, I am a text file")
    assert code_of(tmp_path / "x") == "not-safetensors"


def test_pickle_is_never_loaded(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"a.weight": torch.ones(4, 3)}, tmp_path / "x.safetensors")
    assert code_of(tmp_path / "x.safetensors") == "not-safetensors"


def test_truncated(tmp_path):
    path = raw(tmp_path / "x.safetensors")
    whole = path.read_bytes()
    assert header_length(path) == len(whole)
    path.write_bytes(whole[:-3])
    assert code_of(path) == "truncated"


def test_trailing_bytes(tmp_path):
    path = raw(tmp_path / "x.safetensors")
    path.write_bytes(path.read_bytes() + b"\0\0\0\0")
    assert code_of(path) == "not-safetensors"


def test_header_too_large(tmp_path):
    with (tmp_path / "x").open("wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER_BYTES + 1))
        file.truncate(MAX_HEADER_BYTES + 100)
    assert code_of(tmp_path / "x") == "header-too-large"


def test_header_of_deeply_nested_json(tmp_path):
    header = b'{"a":' + b"[" * 100_000
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(header)) + header)
    assert code_of(tmp_path / "x") == "not-safetensors"


def test_overlapping_tensors(tmp_path):
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    header = json.dumps({"a": entry, "b": entry}).encode()
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    assert code_of(tmp_path / "x") == "not-safetensors"


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_damage_gets_past_the_reader_unnamed(tmp_path_factory, data):
    """Any cut, overwritten or lengthened bundle is refused with a reason; nothing else is ever raised."""
    folder = tmp_path_factory.mktemp("fuzz")
    path = folder / "x.safetensors"
    write_bundle(path, weights(), HEAD, task="digits", base=SPEC)
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    match data.draw(st.sampled_from(["flip", "cut", "insert"])):
        case "flip":
            content[position] ^= 1 << data.draw(st.integers(0, 7))
        case "cut":
            del content[position:]
        case "insert":
            content[position:position] = data.draw(st.binary(min_size=1, max_size=9))
    path.write_bytes(content)
    with contextlib.suppress(BadCheckpoint):
        read = open_bundle(path, SPEC)
        # What stands in the header may change unnoticed, what the digest covers may not.
        assert np.array_equal(read.parameters["a.weight"].float32(), weights()["a.weight"])
        assert np.array_equal(read.head.weight, HEAD.weight)
