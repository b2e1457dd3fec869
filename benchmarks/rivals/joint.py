"""Merges of all tasks at once: what a method may do that sees every model side by side. References, not folds.

Each takes the base and all checkpoints and gives a merged task vector, by the offline methods of `foldd merge`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from foldd.base.network import Base
from foldd.core.bundle import Checkpoint
from foldd.fusion.offline.bundles import merge_bundles
from foldd.fusion.offline.fisher import OfflineFisher
from foldd.fusion.offline.regmean import OfflineRegMean
from foldd.fusion.offline.ties import OfflineTies
from foldd.fusion.offline.tsv_m import OfflineTsvM

JOINT: dict[str, Callable[[Base, Sequence[Checkpoint]], dict[str, Tensor]]] = {
    "joint-ties": partial(merge_bundles, OfflineTies()),
    "joint-tsv-m": partial(merge_bundles, OfflineTsvM()),
    "joint-fisher": partial(merge_bundles, OfflineFisher()),
    "joint-regmean": partial(merge_bundles, OfflineRegMean()),
}
