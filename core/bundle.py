"""The bundle: one task's fine-tuned weights, head and calibration set in one `.safetensors` file.

The format is specified in docs/formats.md. Opening a bundle checks its form (names, shapes, types, sizes,
metadata) against the base; whether its numbers are sound is checked by `foldd.daemon.verify`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from foldd.core.base_spec import BaseSpec
from foldd.core.bundle_fields import checked_task, read_calibration, read_classes, read_head, read_samples, some
from foldd.core.bundle_names import missing_tensors, unknown_tensors
from foldd.core.digests import TensorDigest, sha256_file
from foldd.core.errors import BadCheckpoint
from foldd.core.files import build_file
from foldd.core.quantized import QuantizedTensor
from foldd.core.roles import Role
from foldd.core.scaled import scaled
from foldd.core.tensorfile import StoredTensor, TensorFile, hand_back, open_tensors, write_tensors

FORMAT = "1"
MAX_BUNDLE_BYTES = 8 * 1024**3
MAX_METADATA_BYTES = 1024 * 1024


@dataclass(frozen=True)
class Head:
    """A task's linear classifier on the feature output: weight [classes, features], bias [classes], float32."""

    weight: np.ndarray
    bias: np.ndarray


@dataclass(frozen=True)
class Checkpoint:
    """One task's bundle, opened: everything by value but the parameters, which stay in the file."""

    task: str
    sha256: str
    is_delta: bool  # parameters are differences to the base, not full weights
    parameters: Mapping[str, StoredTensor]  # canonical names; counters left out
    head: Head
    inputs: np.ndarray | None  # calibration inputs [n, *input_shape], float32
    labels: np.ndarray | None  # [n], int64
    samples: int | None  # training-set size
    classes: tuple[str, ...] | None
    is_plain: bool  # a fine-tuned state dict without foldd's metadata
    file: TensorFile


def open_bundle(path: Path, base: BaseSpec, *, sha256: str | None = None, name: str | None = None) -> Checkpoint:
    """Opens a bundle or a plain fine-tuned checkpoint and checks its form against the base.

    Args:
        sha256: digest of the file where it is already known.
        name: file name that errors tell, and that a plain checkpoint's task is taken from, where it is not the path's
            own.

    Raises:
        BadCheckpoint: with a code of its own for each way to be wrong; docs/formats.md lists them.
    """
    name, size = name or path.name, path.stat().st_size
    if size > MAX_BUNDLE_BYTES:
        raise BadCheckpoint("too-large", f"{name} is {size} bytes, the limit is {MAX_BUNDLE_BYTES}.")
    file = open_tensors(path, name=name)
    if (size := sum(len(k) + len(v) for k, v in file.metadata.items())) > MAX_METADATA_BYTES:
        raise BadCheckpoint(
            "metadata-too-large",
            f"{name} has {size} bytes of metadata, the limit is {MAX_METADATA_BYTES}.",
            why="whatever wrote it put a training log or a configuration into the header.",
            remedy="Save it with foldd's own metadata only: `foldd pack` does.",
        )
    sha256 = sha256 or sha256_file(path)
    if "foldd.format" in file.metadata:
        return _open_marked(file, base, sha256, name)
    if any(tensor.startswith(("model/", "delta/")) for tensor in file.tensors):
        raise BadCheckpoint(
            "no-metadata",
            f"{name} has bundle tensors but no foldd.format in its metadata.",
            remedy="Write it with `foldd pack`, or add the metadata of docs/formats.md.",
        )
    return _open_plain(file, base, sha256, name)


def _open_marked(file: TensorFile, base: BaseSpec, sha256: str, name: str) -> Checkpoint:
    meta = file.metadata
    if meta["foldd.format"] != FORMAT:
        raise BadCheckpoint(
            "unknown-format",
            f"{name} has bundle format {meta['foldd.format']!r}, this foldd reads {FORMAT!r}.",
            remedy="Upgrade foldd on this box, or pack the bundle for format 1.",
        )
    if meta.get("foldd.base") != base.digest:
        raise BadCheckpoint(
            "wrong-base",
            f"{name} was made for base {meta.get('foldd.base', '(none)')[:16]}…, this box folds {base.digest[:16]}….",
            why="it was fine-tuned from other weights, or packed against another base file.",
            remedy="Fine-tune from this box's base, or drop it on the box that has its base.",
        )
    if (content := meta.get("foldd.content")) is not None and content != content_digest(file.tensors):
        raise BadCheckpoint(
            "content-mismatch",
            f"{name}: its tensors do not have the digest that its metadata names.",
            why="the file was damaged or only partly written after it was packed.",
            remedy="Copy it again from where it was made.",
        )
    prefixes = {tensor.partition("/")[0] for tensor in file.tensors}
    kinds = prefixes & {"model", "delta"}
    if len(kinds) != 1:
        raise BadCheckpoint(
            "no-parameters" if not kinds else "mixed-parameters",
            f"{name} must hold either model/… or delta/… tensors; it holds {', '.join(sorted(prefixes)) or 'nothing'}.",
        )
    known = {"head/weight", "head/bias", "calibration/inputs", "calibration/labels"}
    if unknown := [t for t in file.tensors if t not in known and t.partition("/")[0] not in kinds | {"step"}]:
        raise BadCheckpoint("unknown-tensors", f"{name}: tensors that no bundle has: {some(unknown)}.")
    kind = kinds.pop()
    parameters = scaled(file.tensors, kind, name)
    head = Head(*read_head(file, "head/weight", "head/bias", base.features, name))
    inputs, labels = read_calibration(file, base.input_shape, len(head.bias), name)
    return Checkpoint(
        task=checked_task(meta.get("foldd.task", ""), name),
        sha256=sha256,
        is_delta=kind == "delta",
        parameters=_canonical(parameters, base, name),
        head=head,
        inputs=inputs,
        labels=labels,
        samples=read_samples(meta.get("foldd.samples"), name),
        classes=read_classes(meta.get("foldd.classes"), len(head.bias), name),
        is_plain=False,
        file=file,
    )


def _open_plain(file: TensorFile, base: BaseSpec, sha256: str, name: str) -> Checkpoint:
    if base.head is None:
        raise BadCheckpoint(
            "no-head",
            f"{name} is a plain checkpoint, but this box's base has no head layer to name its head by.",
            remedy='Pack it with `foldd pack --head …`, or initialise the base with `head = "…"`.',
        )
    own = (f"{base.head}.weight", f"{base.head}.bias")
    parameters = {t: tensor for t, tensor in file.tensors.items() if t not in own}
    return Checkpoint(
        task=checked_task(name.removesuffix(".safetensors"), name),
        sha256=sha256,
        is_delta=False,
        parameters=_canonical(parameters, base, name),
        head=Head(*read_head(file, *own, base.features, name)),
        inputs=None,
        labels=None,
        samples=None,
        classes=None,
        is_plain=True,
        file=file,
    )


def _canonical(parameters: dict[str, StoredTensor], base: BaseSpec, name: str) -> dict[str, StoredTensor]:
    """Checks names, shapes and types; drops counters and the aliases of tied tensors."""
    parameters = {t: stored for t, stored in parameters.items() if t not in base.ignored}
    if unknown := [t for t in parameters if t not in base.tensors]:
        raise unknown_tensors(name, unknown)
    kept: dict[str, StoredTensor] = {}
    for tensor, stored in parameters.items():
        spec = base.tensors[tensor]
        if stored.shape != spec.shape:
            raise BadCheckpoint(
                "wrong-shape",
                f"{name}: {tensor} is {list(stored.shape)}, the base's is {list(spec.shape)}.",
                why="another architecture, or a head of another size under the base's name.",
            )
        if spec.role is Role.COUNTER:
            continue
        if stored.dtype == "I8" and not stored.is_float:
            raise BadCheckpoint(
                "codes-without-step",
                f"{name}: {tensor} is 8-bit integers, and there is no step to scale them by.",
                remedy=f"Store step/{tensor} beside it, as `foldd pack --quantize w8` does, or floats.",
            )
        if not stored.is_float:
            raise BadCheckpoint("wrong-dtype", f"{name}: {tensor} has type {stored.dtype}, weights are floats.")
        canonical = spec.tied_to or tensor
        if canonical in kept and not np.array_equal(kept[canonical].float32(), stored.float32(), equal_nan=True):
            raise BadCheckpoint(
                "untied",
                f"{name}: {tensor} and {canonical} are one tensor in the base, but differ here.",
                remedy="Fine-tune with the weights tied as in the base.",
            )
        kept.setdefault(canonical, stored)
    missing = [t for t, spec in base.canonical.items() if spec.role is not Role.COUNTER and t not in kept]
    if missing:
        raise missing_tensors(name, missing)
    return {t: kept[t] for t in sorted(kept, key=str.encode)}


def content_digest(tensors: Mapping[str, StoredTensor]) -> str:
    """`foldd.content`: a digest of all tensors as stored, by which a damaged or half-written file is known."""
    digest = TensorDigest()
    for name in sorted(tensors, key=str.encode):
        digest.add(name, tensors[name].dtype, tensors[name].stored())
        hand_back(tensors[name].stored())
    return digest.hexdigest()


def write_bundle(
    path: Path,
    parameters: Mapping[str, np.ndarray | QuantizedTensor],
    head: Head,
    *,
    task: str,
    base: BaseSpec,
    is_delta: bool = False,
    inputs: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    samples: int | None = None,
    classes: tuple[str, ...] | None = None,
) -> None:
    """Writes a bundle and opens it once more, so that a bundle that was written is a bundle that is accepted.

    Args:
        parameters: name → array, or codes with their step; full weights or, with `is_delta`, differences to the base.

    Raises:
        BadCheckpoint: what was handed in makes no valid bundle for this base; no file is left.
    """
    prefix = "delta/" if is_delta else "model/"
    tensors: dict[str, np.ndarray] = {}
    for name, values in parameters.items():
        if isinstance(values, QuantizedTensor):
            tensors |= {prefix + name: values.codes, f"step/{name}": values.step}
        else:
            tensors[prefix + name] = values
    # Not `ascontiguousarray`, which makes a vector of a scalar.
    tensors = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    tensors |= {"head/weight": np.ascontiguousarray(head.weight), "head/bias": np.ascontiguousarray(head.bias)}
    if inputs is not None:
        tensors["calibration/inputs"] = np.ascontiguousarray(inputs)
    if labels is not None:
        tensors["calibration/labels"] = np.ascontiguousarray(labels, dtype=np.int64)
    metadata = {"foldd.format": FORMAT, "foldd.task": task, "foldd.base": base.digest}
    if samples is not None:
        metadata["foldd.samples"] = str(samples)
    if classes is not None:
        metadata["foldd.classes"] = json.dumps(list(classes))

    def build(temporary: Path) -> None:
        # Twice: the digest of the content stands in the header, and only the written file has its stored types.
        write_tensors(temporary, tensors, metadata)
        metadata["foldd.content"] = content_digest(open_tensors(temporary).tensors)
        write_tensors(temporary, tensors, metadata)
        open_bundle(temporary, base, name=path.name)

    build_file(path, build)
