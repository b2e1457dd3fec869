"""`foldd merge`: merges models offline, without a daemon."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path

from foldd.core.terminal import in_bytes
from foldd.daemon.commands.common import add_json, print_json, require


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    merge = commands.add_parser(
        "merge",
        help="merge models offline into one .safetensors file",
        description="Merges models of one architecture, tensor by tensor. Each PATH is a .safetensors file, an index "
        "file of a sharded model, a folder with one, a bundle, or, as BASE, a foldd state directory. The first PATH is "
        "the base where the method works on differences to it (all but average and lore), and where it is a foldd "
        "base. docs/methods tells what the methods do.",
    )
    merge.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="[BASE] CHECKPOINT…")
    merge.add_argument("--method", required=True, help="average, task-arithmetic, ties, dare, magmax, tsv-m, …")
    merge.add_argument("-o", "--output", type=Path, required=True, help=".safetensors file, or folder for shards")
    merge.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of the method; repeatable")
    merge.add_argument(
        "--dtype", choices=("same", "float32", "float16", "bfloat16"), default="same",
        help="of the output (default: as the first model stores it)",
    )  # fmt: skip
    merge.add_argument(
        "--shard-bytes", type=int, metavar="N",
        help="largest output file; 0: a single one (default: 5 GB where an input is sharded)",
    )  # fmt: skip
    add_json(merge)
    merge.set_defaults(call=_merge)


def _merge(arguments: argparse.Namespace) -> int:
    require("daemon", "torch")
    from foldd.daemon.merge.run import Request, run

    request = Request(
        arguments.paths, arguments.method, arguments.option, arguments.output, arguments.dtype, arguments.shard_bytes
    )
    before = signal.signal(signal.SIGTERM, _interrupt)  # so that what was half written is removed
    try:
        facts = run(request, _say, _Bar())
    finally:
        signal.signal(signal.SIGTERM, before)
    if arguments.json:
        print_json(facts)
    else:
        print(
            f"{facts['output']}: {in_bytes(facts['bytes'])} in {facts['seconds']:.1f} s, "
            f"peak memory {facts['peak_rss_bytes'] / 1e6:.0f} MB"
        )
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


class _Bar:
    """Percent done and time left on standard error: one line that changes on a terminal, few lines elsewhere."""

    def __init__(self) -> None:
        self._started = self._told = time.monotonic()
        self._is_terminal = sys.stderr.isatty()

    def __call__(self, share: float) -> None:
        now = time.monotonic()
        pause = 0.2 if self._is_terminal else 10.0
        if not share or (share < 1 and now - self._told < pause):
            return
        self._told = now
        left = (now - self._started) * (1 - share) / share
        text = f"{share:4.0%}, {left:.0f} s left" if share < 1 else "100%"
        if self._is_terminal:
            print(f"\r{text}\x1b[K", end="\n" if share == 1 else "", file=sys.stderr, flush=True)
        elif share < 1:
            print(text, file=sys.stderr, flush=True)
