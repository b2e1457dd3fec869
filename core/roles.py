"""What a tensor of the network is. Methods dispatch on roles, never on shape or module type."""

from __future__ import annotations

from enum import StrEnum


class Role(StrEnum):
    """One tensor's part in the network, read from the base's graph.

    A `STATISTIC` is never masked or factorised: means are combined by count and variances by total variance.
    A `COUNTER` (integer buffer) stays the base's.
    """

    MATRIX = "matrix"
    CONVOLUTION = "convolution"
    EMBEDDING = "embedding"
    NORM = "norm"
    BIAS = "bias"
    STATISTIC = "statistic"
    COUNTER = "counter"
