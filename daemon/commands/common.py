"""What commands share: the configuration option, JSON output, the error for a missing extra."""

from __future__ import annotations

import argparse
import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from foldd.core.errors import BadSetup
from foldd.daemon.config import Config, load_config

DAEMON_PACKAGES = ("torch", "onnx", "onnxscript", "ot", "watchdog")
DEFAULTS = ("config.toml", "/etc/foldd/config.toml")


def add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="configuration file (default: $FOLDD_CONFIG, ./config.toml or /etc/foldd/config.toml)",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def config_of(arguments: argparse.Namespace) -> Config:
    """The configuration that a command works with."""
    if arguments.config is not None:
        return load_config(arguments.config)
    named = os.environ.get("FOLDD_CONFIG")
    candidates = [Path(named)] if named else [Path(path) for path in DEFAULTS]
    return load_config(next((path for path in candidates if path.exists()), candidates[0]))


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def require(extra: str, *packages: str) -> None:
    """Checks that packages are there without importing them.

    Raises:
        BadSetup: `missing-extra`.
    """
    for package in packages:
        try:
            found = find_spec(package) is not None
        except ImportError:
            found = False
        if not found:
            raise BadSetup(
                "missing-extra",
                f"This command needs the package {package}, which is not installed.",
                why="`pip install foldd` is the light half: the runtime, and the commands that talk to a daemon.",
                remedy=f"Run `pip install 'foldd[{extra}]'`.",
            )
