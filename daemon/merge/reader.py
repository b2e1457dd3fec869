"""Models in files, as fusion.offline reads them: each piece straight from the file into a fresh float32 tensor.

Not through the memory map: its pages would count as this process' memory, and a file that is cut short under it kills
the process instead of raising an error.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from foldd.core.errors import Unavailable
from foldd.core.roles import Role
from foldd.core.scaled import CODES, ScaledTensor
from foldd.core.tensorwriter import ITEM_BYTES
from foldd.daemon.merge.preflight import Agreement
from foldd.daemon.merge.sources import Place
from foldd.fusion.offline.contract import Calibration

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class FileModels:
    """The `Models` of some files whose headers agree; close it when done."""

    def __init__(self, agreement: Agreement, deltas: tuple[bool, ...], calibration: Calibration | None) -> None:
        copied = {name for names in agreement.copies.values() for name in names}
        self.count = len(agreement.places)
        self.names: Sequence[str] = [name for name in agreement.floats if name not in copied]
        self.has_base = agreement.base is not None
        self.calibration = calibration
        self._agreement, self._deltas = agreement, deltas
        self._handles: dict[Path, int] = {}

    def role(self, name: str) -> Role:
        return self._agreement.roles[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._agreement.floats[name]

    def base(self, name: str, start: int, stop: int) -> Tensor:
        assert self._agreement.base is not None
        return self._read(self._agreement.base, name, start, stop)

    def weights(self, model: int, name: str, start: int, stop: int) -> Tensor:
        values = self._read(self._agreement.places[model], name, start, stop)
        return values.add_(self.base(name, start, stop)) if self._deltas[model] else values

    def raw(self, place: Place) -> bytes:
        """A whole tensor as it is stored."""
        data = bytearray(place.tensor.nbytes)
        self._fill(place, 0, memoryview(data))
        return bytes(data)

    def close(self) -> None:
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()

    def _read(self, places: Mapping[str, Place], name: str, start: int, stop: int) -> Tensor:
        place = places[name]
        kinds = FLOATS | {CODES: torch.int8}
        stored = torch.empty(stop - start, dtype=kinds[place.tensor.dtype])
        if stop > start:
            data = stored.view(torch.uint8).numpy().data
            self._fill(place, start * ITEM_BYTES[place.tensor.dtype], data)
        values = stored.float()
        if isinstance(place.tensor, ScaledTensor):
            values.mul_(torch.from_numpy(place.tensor.steps(start, stop)))
        return values

    def _fill(self, place: Place, start: int, data: memoryview) -> None:
        if place.path not in self._handles:
            self._handles[place.path] = os.open(place.path, os.O_RDONLY | os.O_CLOEXEC)
        offset = place.tensor.start + start
        while data:
            got = os.preadv(self._handles[place.path], [data], offset)
            if not got:
                raise Unavailable(
                    "input-changed", f"{place.path} ended while it was read.",
                    why="somebody writes it at the same time.", remedy="Merge again when it is whole.",
                )  # fmt: skip
            data, offset = data[got:], offset + got
