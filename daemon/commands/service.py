"""`foldd init` and `foldd run`."""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from pathlib import Path

from foldd.core.base_spec import BaseSpec
from foldd.core.errors import BadSetup
from foldd.core.terminal import in_bytes
from foldd.daemon.base_folder import replaced_base, restore_base
from foldd.daemon.commands.common import DAEMON_PACKAGES, add_config, add_json, config_of, print_json, require
from foldd.daemon.config import Config
from foldd.daemon.keys import daemon_identity
from foldd.daemon.layout import Layout
from foldd.daemon.ledger import Ledger
from foldd.daemon.lock import daemon_lock


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    init = commands.add_parser(
        "init",
        help="set up a state directory for a base network",
        description="Takes the base network apart once: feature output, tensor roles, ONNX skeleton. The base is "
        "the operator's own: loading it can execute code. Done again with the same base, it makes the "
        "skeleton anew and leaves folds alone.",
    )
    add_config(init)
    add_json(init)
    init.add_argument("--base", metavar="MODEL", help="model.pt2, package.module:factory or path.py:factory")
    init.add_argument("--weights", metavar="FILE", help=".safetensors for a factory")
    init.add_argument("--input-shape", metavar="N,N,…", help="one sample's shape, for a factory")
    init.add_argument("--features", metavar="NAME", help="node or submodule that is the feature output")
    init.add_argument("--head", metavar="NAME", help="linear layer whose input is the feature output")
    init.set_defaults(call=_init)

    run = commands.add_parser("run", help="run the daemon in the foreground")
    add_config(run)
    run.set_defaults(call=_run)


def _init(arguments: argparse.Namespace) -> int:
    config = config_of(arguments)
    started = time.monotonic()
    spec, has_folds = _initialise(config, arguments)
    facts = {
        "state_directory": str(config.root), "base_digest": spec.digest, "tensors": len(spec.tensors),
        "model_bytes": spec.float_bytes, "input_shape": list(spec.input_shape), "features": spec.features,
        "has_folds": has_folds, "seconds": round(time.monotonic() - started, 3),
    }  # fmt: skip
    if arguments.json:
        print_json(facts)
    else:
        print(f"{config.root} is ready for base {spec.digest[:16]}…")
        print(
            f"  {len(spec.tensors)} tensors, {in_bytes(spec.float_bytes)} in float32, "
            f"input {list(spec.input_shape)}, {spec.features} features"
        )
        if has_folds:
            print("  its folds stay as they are; the next one is exported anew")
        print(f"  next: foldd run --config {config.path}")
    return 0


def _initialise(config: Config, arguments: argparse.Namespace) -> tuple[BaseSpec, bool]:
    """The base as it was taken apart, and whether there are folds onto it already."""
    require("daemon", *DAEMON_PACKAGES)
    from foldd.base.load import load_program
    from foldd.base.renewal import check_same_network
    from foldd.base.store import store_base
    from foldd.daemon.pace import measure_pace

    for noisy in ("torch", "onnx_ir", "onnxscript"):  # they tell of their passes and of packages that nobody needs
        logging.getLogger(noisy).setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)  # torch's own, about torch's own
    settings, layout = config.settings.base, Layout(config.root)
    # The command line is relative to where it is typed, the file's paths to the file.
    model = arguments.base or _resolved(config, settings.model)
    weights = Path(arguments.weights) if arguments.weights else None
    if weights is None and settings.weights:
        weights = config.resolve(settings.weights)
    if not model:
        raise BadSetup("no-base", "No base network is named.", remedy="Give --base, or set base.model in config.toml.")
    shape = settings.input_shape
    if arguments.input_shape:
        try:
            shape = tuple(int(n) for n in arguments.input_shape.split(","))
        except ValueError as error:
            raise BadSetup("bad-shape", f"--input-shape {arguments.input_shape!r} is no list of integers.") from error
    program = load_program(model, weights=weights, input_shape=shape)
    features = settings.features if arguments.features is None else arguments.features
    head = settings.head if arguments.head is None else arguments.head
    layout.create()
    with daemon_lock(layout.lock):
        restore_base(layout)
        folded_onto = _folded_onto(layout)
        with replaced_base(layout) as folder:
            spec = store_base(folder, program, features=features, head=head)
            if folded_onto is not None:
                check_same_network(folder, folded_onto, layout.base)
            measure_pace(folder)
        daemon_identity(config)
        Ledger.create(layout.ledger).close()
    return spec, folded_onto is not None


def _resolved(config: Config, model: str) -> str:
    """A model of the configuration: file paths are relative to it, module names are not paths."""
    place, colon, name = model.rpartition(":")
    if model.endswith(".pt2"):
        return str(config.resolve(model))
    return f"{config.resolve(place)}{colon}{name}" if place.endswith(".py") else model


def _folded_onto(layout: Layout) -> str | None:
    """The digest of the base that the current generation's folds are onto; None where nothing was folded."""
    if not layout.ledger.exists():
        return None
    ledger = Ledger(layout.ledger)
    try:
        current = ledger.current()
    finally:
        ledger.close()
    return None if current is None else str(json.loads(current.manifest)["manifest"]["base"])


def _run(arguments: argparse.Namespace) -> int:
    require("daemon", *DAEMON_PACKAGES)  # the worker's too: better now than at the first checkpoint
    from foldd.daemon.supervisor import Supervisor

    config = config_of(arguments)
    logging.getLogger().setLevel(config.settings.log.level.upper())
    Supervisor(config).run()
    return 0
