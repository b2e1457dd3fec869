"""The one table of offline methods, and their options as the command line gives them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

import msgspec

from foldd.core.errors import BadSetup
from foldd.fusion.offline.average import OfflineAverage
from foldd.fusion.offline.contract import OfflineMethod
from foldd.fusion.offline.dare import OfflineDare
from foldd.fusion.offline.fisher import OfflineFisher
from foldd.fusion.offline.lore import OfflineLore
from foldd.fusion.offline.magmax import OfflineMagMax
from foldd.fusion.offline.regmean import OfflineRegMean
from foldd.fusion.offline.score import OfflineScore
from foldd.fusion.offline.task_arithmetic import OfflineTaskArithmetic
from foldd.fusion.offline.ties import OfflineTies
from foldd.fusion.offline.tsv_m import OfflineTsvM
from foldd.fusion.offline.uowq import OfflineUowq

OFFLINE: dict[str, type[Any]] = {
    method.name: method
    for method in (
        OfflineAverage,
        OfflineDare,
        OfflineFisher,
        OfflineLore,
        OfflineMagMax,
        OfflineRegMean,
        OfflineScore,
        OfflineTaskArithmetic,
        OfflineTies,
        OfflineTsvM,
        OfflineUowq,
    )
}
# Methods that only fold, one checkpoint after the other, and what comes nearest to each.
CONTINUAL_ONLY = {"otmf": "regmean", "otmf-paper": "regmean", "opcm": "tsv-m", "nufilt": "tsv-m"}


def make_offline(name: str, options: Sequence[str]) -> OfflineMethod:
    """The method of that name with options `name=value`.

    Raises:
        BadSetup: `unknown-method`, `continual-only`, `bad-option`.
    """
    if name in CONTINUAL_ONLY:
        raise BadSetup(
            "continual-only",
            f"{name} folds one checkpoint after the other; it does not merge several at once.",
            remedy=f'Use the daemon with method = "{name}", or the nearest offline method: '
            f"--method {CONTINUAL_ONLY[name]}.",
        )
    if name not in OFFLINE:
        close = get_close_matches(name, OFFLINE, 1)
        raise BadSetup(
            "unknown-method", f"There is no offline method {name!r}.",
            remedy=(f"Did you mean {close[0]}? " if close else "") + f"There are: {', '.join(sorted(OFFLINE))}.",
        )  # fmt: skip
    kind, values = OFFLINE[name], {}
    known = [field.name for field in fields(kind)]
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise BadSetup(
                "bad-option", f"--option {option} gives no value.",
                remedy=f"Write --option NAME=VALUE; {name} has {', '.join(known) or 'no options'}.",
            )  # fmt: skip
        if key not in known:
            raise BadSetup(
                "bad-option", f"{name} has no option {key!r}.",
                remedy=f"Give NAME=VALUE; {name} has {', '.join(known) or 'no options'}.",
            )  # fmt: skip
        values[key] = value
    try:
        method: OfflineMethod = msgspec.convert(values, kind, strict=False)
    except msgspec.ValidationError as error:
        raise BadSetup(
            "bad-option", f"{name}: {error}.", remedy="Give numbers as 0.2, truth values as true."
        ) from error
    return method
