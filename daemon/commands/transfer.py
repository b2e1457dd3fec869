"""`foldd submit` and `foldd keygen`."""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shutil
import sys
import time
from pathlib import Path

from foldd.core.digests import sha256_file
from foldd.core.errors import BadSetup, Unavailable
from foldd.core.files import place_new, sync_file
from foldd.core.signatures import new_identity, read_identity, read_public, write_identity
from foldd.daemon.commands.common import add_config, config_of
from foldd.daemon.layout import Layout
from foldd.daemon.ledger import Ledger
from foldd.daemon.progress import Progress
from foldd.daemon.settle import IGNORED_ENDINGS


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    submit = commands.add_parser(
        "submit",
        help="hand a checkpoint to a daemon",
        description="Without --to, the file is copied into this box's inbox in one step.",
    )
    add_config(submit)
    submit.add_argument("file", type=Path)
    way = submit.add_mutually_exclusive_group()
    way.add_argument("--wait", type=float, metavar="SECONDS", help="wait until it is folded (this box's inbox only)")
    way.add_argument("--to", metavar="ENDPOINT", help="send it over the bus: tcp://box:5757")
    way.add_argument("--announce", metavar="ENDPOINT", help="offer it to subscribed daemons: tcp://*:5760")
    submit.add_argument(
        "--identity", type=Path, metavar="FILE", help="own .key; without it plaintext, on loopback only"
    )
    submit.add_argument("--server", type=Path, metavar="FILE", help="with --to: the daemon's .pub")
    submit.add_argument(
        "--daemons", type=Path, metavar="DIR", help="with --announce: folder of the daemons' .pub files"
    )
    submit.add_argument("--confirmations", type=int, default=1, help="with --announce: daemons that must have it")
    submit.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS", help="give up without progress")
    submit.set_defaults(call=_submit)

    keygen = commands.add_parser("keygen", help="make an identity: NAME.key stays here, NAME.pub goes to the others")
    keygen.add_argument("name", help="who this is, for example box1 or ci")
    keygen.add_argument("--directory", type=Path, default=Path(), help="where to write (default: here)")
    keygen.set_defaults(call=_keygen)


def _submit(arguments: argparse.Namespace) -> int:
    if not arguments.file.is_file():
        raise BadSetup("no-file", f"There is no file {arguments.file}.")
    if arguments.to:
        return _send(arguments)
    if arguments.announce:
        return _announce(arguments)
    layout = Layout(config_of(arguments).root)
    if not layout.inbox.is_dir():
        raise BadSetup(
            "not-initialised", f"There is no inbox at {layout.inbox}.", remedy="Run `foldd init` on this box first."
        )
    name = arguments.file.name
    if name.startswith(".") or name.endswith(IGNORED_ENDINGS):
        raise BadSetup(
            "ignored-name",
            f"The inbox ignores {name!r}.",
            why="such names mean that somebody is still writing.",
            remedy="Rename the file.",
        )
    sha256 = sha256_file(arguments.file)
    part = layout.inbox / f".{name}.{sha256[:12]}.{os.getpid()}.part"
    try:
        shutil.copyfile(arguments.file, part)
        sync_file(part)
        stem, suffix = arguments.file.stem, arguments.file.suffix
        numbered = (layout.inbox / f"{stem}.{number}{suffix}" for number in itertools.count(2))
        target = place_new(part, itertools.chain([layout.inbox / name], numbered))
    finally:
        part.unlink(missing_ok=True)
    print(f"{target.name} is in the inbox ({sha256[:12]}…)")
    return _wait(layout, sha256, arguments.wait) if arguments.wait else 0


def _send(arguments: argparse.Namespace) -> int:
    from foldd.daemon.bus.submit import submit_file

    identity = read_identity(arguments.identity) if arguments.identity else None
    server = read_public(arguments.server) if arguments.server else None
    progress = Progress(sys.stderr)
    result = submit_file(
        arguments.file, arguments.to, identity, server, timeout_s=arguments.timeout,
        progress=lambda sent, size: progress.update(sent / size, f"sending {arguments.file.name}"),
    )  # fmt: skip
    progress.done()
    print(f"{result.name}: {result.state} ({result.sha256[:12]}…)")
    # It was set aside there before, and sending the same bytes again changes nothing.
    return 1 if result.state in ("held", "quarantined") else 0


def _announce(arguments: argparse.Namespace) -> int:
    from foldd.daemon.bus.auth import AllowList
    from foldd.daemon.bus.publisher import publish_file

    identity = read_identity(arguments.identity) if arguments.identity else None
    daemons = AllowList(arguments.daemons) if arguments.daemons else None
    progress = Progress(sys.stderr)
    result = publish_file(
        arguments.file, arguments.announce, identity, daemons,
        confirmations=arguments.confirmations, timeout_s=arguments.timeout,
        progress=lambda asked, size: progress.update(asked / size, f"offering {arguments.file.name}"),
    )  # fmt: skip
    progress.done()
    print(f"{arguments.file.name}: {len(result.stored)} daemons have it ({result.sha256[:12]}…)")
    return 0


def _wait(layout: Layout, sha256: str, seconds: float) -> int:
    ledger, until = Ledger(layout.ledger, read_only=True), time.monotonic() + seconds
    try:
        while time.monotonic() < until:
            arrival = ledger.arrival(sha256)
            if arrival is not None and arrival.state == "folded":
                generation = next(row for row in ledger.generations() if row.arrival == arrival.id)
                print(f"folded into generation {generation.generation}")
                return 0
            if arrival is not None and arrival.state in ("held", "quarantined"):
                error = arrival.error or {}
                state = "set aside" if arrival.state == "quarantined" else "held"
                print(f"{state} ({error.get('code')}): {error.get('what')}")
                return 1
            time.sleep(0.2)
    finally:
        ledger.close()
    raise Unavailable(
        "not-folded-yet",
        f"{sha256[:12]}… was not folded within {seconds:g} s.",
        why="the daemon does not run, or is busy with others.",
        remedy="Look at `foldd status`.",
    )


def _keygen(arguments: argparse.Namespace) -> int:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", arguments.name):
        raise BadSetup("bad-name", f"{arguments.name!r} cannot name a key.", remedy="Use letters, digits and . _ -")
    secret, public = write_identity(new_identity(arguments.name), arguments.directory)
    print(f"{secret}  secret: stays on this machine")
    print(f"{public}  public: copy it into the folders of those who are to trust {arguments.name}")
    return 0
