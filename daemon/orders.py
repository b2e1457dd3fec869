"""What an operator orders beside a running daemon: `foldd retry` and `foldd forget`.

An order is an empty file `orders/<verb>-<sha256>` in the state directory, made in one step, so that it survives a
crash and waits where no daemon runs. The supervisor, the ledger's only writer, carries it out and then removes it:
carried out twice, it changes nothing more.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

from foldd.core.files import write_file
from foldd.daemon.intake import Intake
from foldd.daemon.layout import Layout
from foldd.daemon.ledger import Ledger

log = logging.getLogger("foldd")

RETRY, FORGET = "retry", "forget"
_ORDER = re.compile(rf"({RETRY}|{FORGET})-([0-9a-f]{{64}})")


def give(layout: Layout, verb: str, sha256: str) -> Path:
    """Leaves an order for the daemon: a file that is there until it is carried out."""
    layout.orders.mkdir(exist_ok=True)
    path = layout.orders / f"{verb}-{sha256}"
    write_file(path, b"")
    return path


def carry_out(layout: Layout, ledger: Ledger, intake: Intake) -> None:
    """Does what was ordered. What is no order, or came too late, is removed."""
    for path in sorted(layout.orders.iterdir()) if layout.orders.is_dir() else []:
        match = _ORDER.fullmatch(path.name)
        if match is None:
            continue  # being written
        arrival = ledger.arrival(match[2])
        if arrival is not None and match[1] == RETRY:
            intake.retry(arrival)
        elif arrival is not None:
            intake.forget(arrival)
        path.unlink()
