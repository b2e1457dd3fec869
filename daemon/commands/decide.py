"""`foldd retry` and `foldd forget`: what is to become of a checkpoint that is held, or was set aside."""

from __future__ import annotations

import argparse
import time

from foldd.core.errors import BadSetup, Unavailable
from foldd.daemon import orders
from foldd.daemon.commands.common import add_config, config_of
from foldd.daemon.layout import Layout
from foldd.daemon.ledger import Arrival, Ledger
from foldd.daemon.lock import holder

_WAIT_SECONDS = 30.0


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    retry = commands.add_parser(
        "retry", help="fold a held checkpoint all the same, or try one again that was set aside"
    )
    forget = commands.add_parser("forget", help="drop a checkpoint that waits, is held or was set aside, with its file")
    for command, verb in ((retry, orders.RETRY), (forget, orders.FORGET)):
        add_config(command)
        command.add_argument(
            "id", metavar="ID", help="the first characters of its SHA-256, as `foldd status` shows them"
        )
        command.set_defaults(call=_order, verb=verb)


def _order(arguments: argparse.Namespace) -> int:
    layout = Layout(config_of(arguments).root)
    ledger = Ledger(layout.ledger, read_only=True)
    try:
        arrival = _find(ledger, arguments.id)
        allowed = ("held", "quarantined") if arguments.verb == orders.RETRY else ("held", "quarantined", "queued")
        if arrival.state not in allowed:
            raise BadSetup(
                "nothing-to-decide",
                f"{arrival.name} is {arrival.state}.",
                remedy="`foldd status` shows what is held, the folder quarantine/ what was set aside.",
            )
        order = orders.give(layout, arguments.verb, arrival.sha256)
        if holder(layout.lock) is None:
            print(f"{arrival.name}: foldd is not running; it will {arguments.verb} it when it starts")
            return 0
        until = time.monotonic() + _WAIT_SECONDS
        while order.exists():
            if time.monotonic() > until:
                raise Unavailable(
                    "not-done-yet",
                    f"The daemon has not taken the order within {_WAIT_SECONDS:g} s.",
                    why="it is busy with a large file.",
                    remedy="The order stands; look at `foldd status`.",
                )
            time.sleep(0.1)
    finally:
        ledger.close()
    print(f"{arrival.name}: {'queued' if arguments.verb == orders.RETRY else 'forgotten'}")
    return 0


def _find(ledger: Ledger, prefix: str) -> Arrival:
    matches = [a for a in ledger.arrivals() if a.sha256.startswith(prefix.lower())] if len(prefix) >= 4 else []
    if len(matches) == 1:
        return matches[0]
    raise BadSetup(
        "unknown-id",
        f"{len(matches) or 'No'} checkpoints have an ID that begins with {prefix!r}.",
        remedy="Give at least 4 characters of a SHA-256 that `foldd status` or a reason.json shows.",
    )
