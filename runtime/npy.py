"""Reading one `.npy` array that somebody sent: no pickles, no archives, no allocation beyond what came."""

from __future__ import annotations

import io

import numpy as np

from foldd.core.errors import BadRequest


def parse_npy(data: bytes) -> np.ndarray:
    """A read-only view of the array in `data`.

    Raises:
        BadRequest: `not-npy`.
    """
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"version {version} of the format")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        if dtype.hasobject or dtype.names is not None:
            raise ValueError(f"type {dtype}")
        count = 1
        for n in shape:
            count *= n
        if count < 0 or count * dtype.itemsize != len(data) - file.tell():
            raise ValueError(f"{len(data) - file.tell()} bytes for shape {shape}")
        array = np.frombuffer(data, dtype, count, file.tell()) if count else np.empty(0, dtype)
        return array.reshape(shape, order="F" if fortran else "C")
    except Exception as error:  # whatever numpy stumbles over
        raise BadRequest(
            "not-npy", f"The body is no .npy array: {error}", remedy="Write it with numpy.save."
        ) from error
