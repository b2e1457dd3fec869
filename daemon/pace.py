"""How fast this box quantizes this base: measured once, so that seconds can become a count before the work."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path

from foldd.core.files import write_file
from foldd.daemon.plan import PACE

_ENOUGH_SECONDS = 5.0  # of measuring; the rest is taken in proportion
_INPUTS = 32


def measure_pace(directory: Path) -> float:
    """Seconds of one iteration of reconstruction over all blocks of the base in `directory`; written beside it."""
    import torch

    from foldd.base.store import open_base
    from foldd.daemon.quantizing import folded_weights
    from foldd.quantize.hdrq import as_shipped

    base = open_base(directory)
    weights = folded_weights(base, base.weights)
    inputs = torch.randn(_INPUTS, *base.spec.input_shape, generator=torch.Generator().manual_seed(0))
    started, share = time.monotonic(), 1.0

    def watch(fraction: float) -> None:
        nonlocal share
        share = fraction
        if time.monotonic() - started > _ENOUGH_SECONDS:
            raise _EnoughError

    with suppress(_EnoughError):
        as_shipped(8, None, 1).quantize(base.folded, weights, None, {}, inputs, seed=0, progress=watch)
    pace = (time.monotonic() - started) / share
    write_file(directory / PACE, json.dumps({"seconds_per_iteration": pace}).encode() + b"\n")
    return pace


class _EnoughError(Exception):
    pass
