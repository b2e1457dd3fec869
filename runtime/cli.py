"""`foldd-runtime`: infer, fetch, serve, status. Exit codes: 0 done, 1 nothing served (`status`), 2 an error, told on
standard error."""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from foldd.core.errors import BadRequest, BadSetup, FolddError
from foldd.core.manifest import read_manifest
from foldd.core.notify import notify, watchdog_interval_s
from foldd.core.outputs import check_folder, check_not_input
from foldd.core.signatures import PublicIdentity, read_identity, read_public
from foldd.core.terminal import CommandParser, tell
from foldd.runtime.fetch import Fetcher, Source
from foldd.runtime.store import Store


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; its exit code."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        return tell(lambda: arguments.run(arguments))
    except FolddError as error:
        print(f"foldd-runtime: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="foldd-runtime", description="Serve the model that a foldd daemon keeps.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=CommandParser)

    infer = commands.add_parser("infer", help="answer one .npy file")
    infer.set_defaults(run=_infer)
    _add_state(infer)
    infer.add_argument("--task", required=True)
    infer.add_argument("--input", required=True, type=Path, metavar="X.npy", help="[n, *input_shape]")
    infer.add_argument("--output", type=Path, metavar="Y.npy", help="write the logits here")
    infer.add_argument("--json", action="store_true")
    _add_trust(infer)

    fetch = commands.add_parser("fetch", help="bring the daemon's generation here")
    fetch.set_defaults(run=_fetch)
    _add_state(fetch)
    _add_source(fetch, required=True)
    _add_trust(fetch)
    fetch.add_argument("--follow", action="store_true", help="stay, and fetch every new generation")
    fetch.add_argument("--timeout", type=float, default=30.0, metavar="SECONDS", help="without progress")
    fetch.add_argument("--json", action="store_true")

    serve = commands.add_parser("serve", help="answer over HTTP, and swap to new generations")
    serve.set_defaults(run=_serve)
    _add_state(serve)
    _add_source(serve, required=False)
    _add_trust(serve)
    serve.add_argument("--listen", default="127.0.0.1:8470", metavar="HOST:PORT")
    serve.add_argument("--policy", choices=["availability", "memory"], default="availability", help="of swaps")
    serve.add_argument("--threads", type=int, default=0, help="of one inference; 0: all cores")

    status = commands.add_parser("status", help="what is in a directory")
    status.set_defaults(run=_status)
    _add_state(status)
    status.add_argument("--json", action="store_true")
    return parser


def _add_state(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--state", required=True, type=Path, metavar="DIR", help="the device's store, or a daemon's state directory"
    )


def _add_source(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument("--from", dest="source", required=required, metavar="tcp://…", help="the daemon's `bind`")
    parser.add_argument("--announcements", metavar="tcp://…", help="the daemon's `announce`")
    parser.add_argument("--identity", type=Path, metavar="device.key", help="without it: plaintext, loopback only")


def _add_trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust", type=Path, action="append", default=[], metavar="daemon.pub",
        help="whose generations are taken; the first is also the key of the daemon that is spoken to",
    )  # fmt: skip


def _trusted(arguments: argparse.Namespace) -> tuple[PublicIdentity, ...]:
    trusted = tuple(read_public(path) for path in arguments.trust)
    if getattr(arguments, "source", None) and not trusted:
        raise BadSetup(
            "no-trust", "--trust is missing.", why="a device takes only what a daemon that it knows has signed.",
            remedy="Copy the daemon's .pub file here and give it with --trust.",
        )  # fmt: skip
    return trusted


def _source(arguments: argparse.Namespace, trusted: tuple[PublicIdentity, ...], timeout_s: float) -> Source | None:
    if not arguments.source:
        return None
    identity = None if arguments.identity is None else read_identity(arguments.identity)
    server = trusted[0] if trusted else None
    return Source(arguments.source, identity, server, arguments.announcements, timeout_s=timeout_s)


def _infer(arguments: argparse.Namespace) -> int:
    from foldd.runtime.slot import Slot  # onnxruntime only where it is needed

    if arguments.output is not None:
        check_not_input(arguments.output, [arguments.input])
        if not arguments.output.exists():  # what exists is written into, a pipe or device too
            check_folder(arguments.output)
    slot = Slot(arguments.state, _trusted(arguments) or None)
    slot.refresh()
    try:
        inputs = np.load(arguments.input, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise BadRequest("not-npy", f"{arguments.input} is no .npy array: {error}") from error
    session = slot.session
    logits = session.infer(arguments.task, inputs)
    if slot.last_error is not None:
        print(f"foldd-runtime: answering from an older generation: {slot.last_error}", file=sys.stderr)
    if arguments.output is not None:
        with arguments.output.open("wb") as file:  # np.save on a path would add a suffix
            np.save(file, logits)
    names = session.manifest.tasks[arguments.task].names
    best = logits.argmax(axis=-1).tolist()
    classes = best if names is None else [names[i] for i in best]
    if arguments.json:
        _print_json({"generation": session.generation, "task": arguments.task, "classes": classes, "indices": best})
    else:
        print(f"generation {session.generation}, task {arguments.task}")
        for index, name in enumerate(classes):
            print(f"{index}\t{name}")
    return 0


def _fetch(arguments: argparse.Namespace) -> int:
    trusted = _trusted(arguments)
    source = _source(arguments, trusted, arguments.timeout)
    assert source is not None
    feed = _feeder()
    fetcher = Fetcher(source, Store(arguments.state, trusted), progress=lambda done, total: feed())
    try:
        manifest = None
        if not arguments.follow:
            manifest = fetcher.fetch()
            _tell_fetched(arguments, manifest.generation)
            return 0
        stopping = fetcher.stopping = _stop_on_signals()
        notify("READY=1")
        failed = ""
        while not stopping.is_set():
            try:
                manifest = fetcher.poll(0.5)
                failed = ""
            except FolddError as error:
                manifest = None
                if error.what != failed and not stopping.is_set():
                    print(f"foldd-runtime: {error}", file=sys.stderr)
                failed = error.what
                stopping.wait(2.0)
            if manifest is not None:
                _tell_fetched(arguments, manifest.generation)
            feed()
        notify("STOPPING=1")
        return 0
    finally:
        fetcher.close()


def _serve(arguments: argparse.Namespace) -> int:
    from foldd.runtime.client import Runtime
    from foldd.runtime.server import InferenceServer
    from foldd.runtime.slot import SwapPolicy

    host, _, port = arguments.listen.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise BadSetup(
            "bad-listen",
            f"--listen {arguments.listen} is not HOST:PORT.",
            remedy="Write 127.0.0.1:8470; ports are up to 65535.",
        )
    trusted = _trusted(arguments)
    runtime = Runtime(
        arguments.state,
        _source(arguments, trusted, 30.0),
        trusted or None,
        policy=SwapPolicy(arguments.policy),
        threads=arguments.threads,
    )
    stopping = _stop_on_signals()
    try:
        server = InferenceServer((host.strip("[]"), int(port)), runtime)
    except OSError as error:
        runtime.stop()
        raise BadSetup("cannot-listen", f"{arguments.listen} cannot be bound: {error.strerror}.") from error
    runtime.start(_feeder())
    thread = threading.Thread(target=server.serve_forever, name="foldd-http", daemon=True)
    thread.start()
    print(f"serving {arguments.state} on {server.url}", file=sys.stderr)
    notify("READY=1")
    while not stopping.wait(0.5):
        if not runtime.alive or not thread.is_alive():
            print("foldd-runtime: a thread ended; see above", file=sys.stderr)
            return 2
    notify("STOPPING=1")
    server.shutdown()
    server.server_close()
    runtime.stop()
    return 0


def _status(arguments: argparse.Namespace) -> int:
    try:
        manifest = read_manifest((arguments.state / "current" / "manifest.json").read_bytes()).manifest
    except OSError:
        manifest = None
    facts: dict[str, Any] = {"generation": None, "tasks": []}
    if manifest is not None:
        facts = {
            "generation": manifest.generation,
            "tasks": sorted(manifest.tasks),
            "method": manifest.method,
            "base": manifest.base,
            "created": manifest.created,
            "artifact_bytes": manifest.artifact.bytes,
            "artifact_sha256": manifest.artifact.sha256,
            "input_shape": list(manifest.artifact.input_shape),
        }
    if arguments.json:
        _print_json(facts)
    elif manifest is None:
        print(f"no generation in {arguments.state}")
    else:
        for key, value in facts.items():
            print(f"{key:16} {', '.join(map(str, value)) if isinstance(value, list) else value}")
    return 0 if manifest is not None else 1


def _stop_on_signals() -> threading.Event:
    stopping = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        stopping.set()

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
    return stopping


def _feeder() -> Callable[[], None]:
    """Feeds systemd's watchdog from the loop that makes progress, not from a timer that would outlive it."""
    interval, fed = watchdog_interval_s(), float("-inf")

    def feed() -> None:
        nonlocal fed
        if interval is not None and time.monotonic() - fed >= interval / 2:
            fed = time.monotonic()
            notify("WATCHDOG=1")

    return feed


def _tell_fetched(arguments: argparse.Namespace, generation: int) -> None:
    if arguments.json:
        _print_json({"generation": generation})
    else:
        print(f"generation {generation}", flush=True)


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    sys.exit(main())
