"""Whether models can be merged, told from their headers alone, and everything that is wrong at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from foldd.core.bundle_names import sharded_model
from foldd.core.digests import TensorDigest
from foldd.core.errors import BadCheckpoint, BadSetup
from foldd.core.roles import Role
from foldd.daemon.merge.sources import Place, Source

SHOWN = 20  # problems named one by one
_SAMPLE = 4096  # bytes by which tied tensors are suspected


@dataclass(frozen=True)
class Agreement:
    """What base and models have in common.

    Attributes:
        floats: name → shape of all tensors that are merged, in name order.
        roles: of the same.
        places: of each model: name → where its tensor is.
        base: name → place; None without a base.
        integers: name → place of the tensor that is taken over as it is.
        copies: name → names that hold the same tensor in every model: it is merged once and written to all of them.
        notes: sentences for the user.
    """

    floats: Mapping[str, tuple[int, ...]]
    roles: Mapping[str, Role]
    places: Sequence[Mapping[str, Place]]
    base: Mapping[str, Place] | None
    integers: Mapping[str, Place]
    copies: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...]

    @property
    def sizes(self) -> list[int]:
        return [int(np.prod(shape, dtype=np.int64)) for shape in self.floats.values()]


def agree(base: Source | None, models: Sequence[Source]) -> Agreement:
    """Compares the headers of all inputs.

    Raises:
        BadCheckpoint: `models-differ`, which names every difference.
        BadSetup: `delta-without-base`, `wrong-base`.
    """
    _check_bundles(base, models)
    _check_digest(base, models)
    notes: list[str] = []
    sources = models if base is None else [base, *models]
    if base is not None and base.spec is not None:
        tables = [dict(base.tensors), *(_resolved(base, model, notes) for model in models)]
        reference = {name for name, spec in base.spec.canonical.items() if spec.role is not Role.COUNTER}
    else:
        tables = [dict(source.tensors) for source in sources]
        reference = set(tables[0])
        if base is not None and all(model.is_bundle for model in models):
            # A bundle has no head and may lack counters: the base's are not part of the merge.
            others = reference - set().union(*tables[1:])
            reference -= others
            tables[0] = {name: place for name, place in tables[0].items() if name in reference}
            if others:
                notes.append(f"left out, as only the base has them: {_some(sorted(others))}")
    for model in models:
        if model.left_out:
            notes.append(f"{model.label}: left out, as they are no weights: {_some(model.left_out)}")
    problems = list(_problems(reference, sources, tables))
    if problems:
        shown = "\n".join(f"  - {problem}" for problem in problems[:SHOWN])
        more = f"\n  - and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise BadCheckpoint(
            "models-differ",
            f"These models cannot be merged as they are:\n{shown}{more}",
            why="another architecture or vocabulary, heads of different sizes, or a part of a model.",
            remedy=_shard_hint(sources) + "Merge models of one architecture. Task heads differ by nature: save the "
            "backbones without them, or name a foldd state directory as BASE, whose head is known and left out.",
        )
    first = tables[0]
    names = sorted(reference, key=str.encode)
    integers = {name: first[name] for name in names if not first[name].tensor.is_float}
    if integers:
        notes.append(f"not merged but taken from {sources[0].label}, as they are integers: {_some(list(integers))}")
    floats = {name: first[name].tensor.shape for name in names if name not in integers}
    kinds = Counter(table[name].tensor.dtype for table in tables for name in floats)
    if len(kinds) > 1:
        notes.append(f"the inputs store {', '.join(sorted(kinds))}; everything is computed in float32")
    elif "F64" in kinds:
        notes.append("the inputs store F64; everything is computed in float32")
    roles = {
        name: base.spec.tensors[name].role if base is not None and base.spec is not None else guess_role(name, shape)
        for name, shape in floats.items()
    }
    has_graph = base is not None and base.spec is not None  # which knows what is tied
    copies = {} if has_graph else _copies(floats, tables)
    notes += [f"tied in all inputs, merged once: {name} = {' = '.join(same)}" for name, same in copies.items()]
    places = tables if base is None else tables[1:]
    return Agreement(floats, roles, places, None if base is None else first, integers, copies, tuple(notes))


def _shard_hint(sources: Sequence[Source]) -> str:
    for source in sources:
        if not source.is_sharded and (whole := sharded_model(source.files[0].name)):
            return f"{source.label} is one shard of a model: name {whole}.safetensors.index.json, its index, instead. "
    return ""


def guess_role(name: str, shape: tuple[int, ...]) -> Role:
    """A floating-point tensor's role where no graph is at hand: from its name and number of dimensions."""
    last = name.rpartition(".")[2]
    if last in ("running_mean", "running_var"):
        return Role.STATISTIC
    if len(shape) < 2:
        return Role.BIAS if "bias" in last else Role.NORM
    if len(shape) == 2:
        return Role.EMBEDDING if "embed" in name.lower() else Role.MATRIX
    return Role.EMBEDDING if shape[0] == 1 else Role.CONVOLUTION


def _check_bundles(base: Source | None, models: Sequence[Source]) -> None:
    if base is None and (deltas := [model.label for model in models if model.is_delta]):
        raise BadSetup(
            "delta-without-base",
            f"{_some(deltas)}: such a bundle holds differences to a base, and no base is given.",
            remedy="Name the base first: foldd merge BASE CHECKPOINT….",
        )
    digests = {model.base_digest for model in models if model.base_digest}
    if base is not None and base.spec is not None:
        digests.add(base.spec.digest)
    if len(digests) > 1:
        raise BadSetup(
            "wrong-base",
            f"Bundles and base belong to different networks: {', '.join(sorted(d[:16] + '…' for d in digests))}.",
            why="one of them was fine-tuned from other weights.",
            remedy="Merge bundles of one base.",
        )


def _check_digest(base: Source | None, models: Sequence[Source]) -> None:
    """Bundles name their base's digest; a plain file beside them must have it. One tensor is in memory at a time."""
    bundle = next((model for model in models if model.is_bundle), None)
    if base is None or base.spec is not None or bundle is None:
        return
    digest = TensorDigest()
    for name in sorted(bundle.tensors.keys() & base.tensors.keys(), key=str.encode):
        place = base.tensors[name]
        if place.tensor.dtype == "F32":
            values = np.frombuffer(b"".join(place.bytes()), "<f4").reshape(place.tensor.shape)
        elif place.tensor.is_float:
            values = place.tensor.float32()
        else:
            continue
        digest.add(name, "float32", values)
    if digest.hexdigest() != bundle.base_digest:
        raise BadSetup(
            "wrong-base",
            f"{base.label} is not the base that {bundle.label} was made for: its tensors have another digest.",
            why="it was fine-tuned from other weights, or the file holds the base in half precision.",
            remedy="Name the base as it was when the bundle was packed, or the foldd state directory.",
        )


def _resolved(base: Source, model: Source, notes: list[str]) -> dict[str, Place]:
    """A model's tensors under the base's canonical names, without what is no part of the merge."""
    spec = base.spec
    assert spec is not None
    head = () if spec.head is None else (f"{spec.head}.weight", f"{spec.head}.bias")
    table: dict[str, Place] = {}
    dropped = []
    for name, place in model.tensors.items():
        known = spec.tensors.get(name)
        if known is None:
            if name in head or name in spec.ignored:
                dropped.append(name)
            else:
                table[name] = place  # a problem, named with the others
        elif known.role is not Role.COUNTER:
            canonical = known.tied_to or name
            if canonical in table and not _equal(table[canonical], place):
                raise BadCheckpoint(
                    "untied", f"{model.label}: {name} and {canonical} are one tensor in the base, but differ here.",
                    remedy="Fine-tune with the weights tied as in the base.",
                )  # fmt: skip
            table.setdefault(canonical, place)
    if dropped:
        notes.append(f"{model.label}: left out, as the features do not need them: {_some(dropped)}")
    return table


def _problems(reference: set[str], sources: Sequence[Source], tables: Sequence[Mapping[str, Place]]) -> Iterator[str]:
    first = tables[0]
    for source, table in zip(sources, tables, strict=True):
        if missing := sorted(reference - table.keys()):
            yield f"{source.label} lacks {_some(missing)}"
        if extra := sorted(table.keys() - reference):
            yield f"{source.label} alone has {_some(extra)}"
        for name in sorted(reference & table.keys() & first.keys()):
            one, other = first[name].tensor, table[name].tensor
            if one.shape != other.shape:
                yield f"{name} is {list(other.shape)} in {source.label}, {list(one.shape)} in {sources[0].label}"
            elif one.is_float != other.is_float or (not one.is_float and one.dtype != other.dtype):
                yield f"{name} is {other.dtype} in {source.label}, {one.dtype} in {sources[0].label}"


def _copies(floats: Mapping[str, tuple[int, ...]], tables: Sequence[Mapping[str, Place]]) -> dict[str, tuple[str, ...]]:
    """Tensors that are byte for byte the same in each of the inputs: tied weights, stored more than once.

    Constants, such as fresh norms, look the same too; merging them once gives the same.
    """
    shapes = Counter(floats.values())
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, shape in floats.items():
        if len(shape) < 2 or 0 in shape or shapes[shape] < 2:
            continue
        key = (shape, *(_sample(table[name]) for table in tables))
        groups.setdefault(key, []).append(name)
    copies: dict[str, tuple[str, ...]] = {}
    for first, *others in groups.values():
        same = tuple(name for name in others if all(_equal(table[first], table[name]) for table in tables))
        if same:
            copies[first] = same
    return copies


def _sample(place: Place) -> tuple[str, bytes]:
    return place.tensor.dtype, b"".join(place.bytes(_SAMPLE))


def _equal(one: Place, other: Place) -> bool:
    if (one.tensor.dtype, one.tensor.shape) != (other.tensor.dtype, other.tensor.shape):
        return False
    return all(a == b for a, b in zip(one.bytes(), other.bytes(), strict=True))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
