"""Taking a base apart anew under existing folds: it must be the same network, whatever its skeleton looks like now."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

from foldd.core.base_spec import BaseSpec, read_base_spec
from foldd.core.errors import BadSetup

log = logging.getLogger("foldd.base")

_SAMPLES, _SEED = 4, 0
_TOLERANCE = 1e-3  # of the largest feature; another torch sums in another order, another output is far away


def check_same_network(new: Path, digest: str, old: Path) -> None:
    """Whether folds stay what they are with the base in `new`.

    Its digest tells of the weights alone: where the feature output is another node, it is the same, and heads are
    worthless all the same. So both networks are asked.

    Args:
        digest: of the base that the folds are onto.
        old: the folder of that base, if it is still there.

    Raises:
        BadSetup: `another-base`.
    """
    after = read_base_spec(new / "base.json")
    if after.digest != digest:
        raise _another_base(f"This is base {after.digest[:16]}…, the folds are onto base {digest[:16]}….")
    if not (old / "base.json").exists():
        return
    before = read_base_spec(old / "base.json")
    if _shape(before) != _shape(after):
        raise _another_base("Its names, roles, input or features are not those of the base that the folds are onto.")
    try:
        expected = _features(old, before)
    except Exception as error:  # noqa: BLE001 - whatever this torch says to an older one's archive
        log.warning("not checked whether the feature output is the same: %s cannot be loaded: %s", old, error)
        return
    if not torch.allclose(_features(new, after), expected, rtol=0, atol=_TOLERANCE * float(expected.abs().max())):
        raise _another_base("Its weights are those of the base that the folds are onto, its feature output is another.")


def _another_base(what: str) -> BadSetup:
    return BadSetup(
        "another-base",
        what,
        why="another base, --head or --features than before; heads and folds of the one are worthless on the other.",
        remedy="Name the base as at the first `foldd init`, or a fresh directory under state.directory.",
    )


def _shape(spec: BaseSpec) -> tuple[object, ...]:
    return spec.canonical, spec.input_shape, spec.features


def _features(folder: Path, spec: BaseSpec) -> Tensor:
    inputs = torch.randn(_SAMPLES, *spec.input_shape, generator=torch.Generator().manual_seed(_SEED))
    with torch.no_grad():
        features: Tensor = torch.export.load(folder / "program.pt2").module(check_guards=False)(inputs)
    return features
