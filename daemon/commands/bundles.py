"""`foldd pack`: makes a bundle out of what training code has: weights, a head, calibration arrays."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from foldd.core.base_spec import BaseSpec, read_base_spec
from foldd.core.bundle import Head, write_bundle
from foldd.core.errors import BadCheckpoint
from foldd.core.quantized import QuantizedTensor
from foldd.core.roles import Role
from foldd.core.rounding import is_worth_codes, to_integers
from foldd.core.tensorfile import StoredTensor, open_tensors
from foldd.daemon.commands.common import add_config, config_of
from foldd.daemon.layout import Layout


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    pack = commands.add_parser("pack", help="make a bundle of weights, head and calibration inputs")
    add_config(pack)
    pack.add_argument("weights", type=Path, help=".safetensors with the fine-tuned weights under the base's own names")
    pack.add_argument("-o", "--output", type=Path, required=True, help="the bundle to write")
    pack.add_argument("--task", help="name of the task (default: the output file's stem)")
    pack.add_argument(
        "--head",
        type=Path,
        help=".safetensors with `weight` [classes, features] and `bias` (default: the base's head layer in WEIGHTS)",
    )
    pack.add_argument("--calibration", type=Path, help=".npy with inputs [n, …] as the network sees them; 64 will do")
    pack.add_argument("--labels", type=Path, help=".npy with their labels [n]; optional")
    pack.add_argument("--samples", type=int, help="training-set size")
    pack.add_argument("--classes", help="class names, separated by commas")
    pack.add_argument("--delta", action="store_true", help="store differences to the base instead of weights")
    pack.add_argument(
        "--quantize",
        choices=["w8"],
        help="store differences as 8-bit integers, one step a channel: about a quarter of the bytes; implies --delta",
    )
    pack.set_defaults(call=_pack)


def _pack(arguments: argparse.Namespace) -> int:
    layout = Layout(config_of(arguments).root)
    spec = read_base_spec(layout.base / "base.json")
    stored = dict(open_tensors(arguments.weights).tensors)
    head = _head(arguments.head, stored, spec)
    parameters = {
        spec.tensors[name].tied_to or name: tensor.float32()
        for name, tensor in stored.items()
        if name in spec.tensors and spec.tensors[name].role is not Role.COUNTER
    }
    own = {f"{spec.head}.weight", f"{spec.head}.bias"} if spec.head else set()
    if unknown := [n for n in stored if n not in spec.tensors and n not in spec.ignored and n not in own]:
        raise BadCheckpoint(
            "unknown-tensors",
            f"{arguments.weights} holds {unknown[0]!r}, which the base does not have.",
            why="another architecture, or names with a prefix such as `module.`.",
        )
    is_delta = arguments.delta or arguments.quantize is not None
    if is_delta:
        base = open_tensors(layout.base / "weights.safetensors").tensors
        parameters = {name: array - base[name].float32() for name, array in parameters.items()}
    write_bundle(
        arguments.output,
        _quantized(parameters, spec) if arguments.quantize else parameters,
        head,
        task=arguments.task or arguments.output.name.removesuffix(".safetensors"),
        base=spec,
        is_delta=is_delta,
        inputs=_array(arguments.calibration, np.float32),
        labels=_array(arguments.labels, np.int64),
        samples=arguments.samples,
        classes=tuple(arguments.classes.split(",")) if arguments.classes else None,
    )
    print(f"{arguments.output}: {arguments.output.stat().st_size / 1e6:.1f} MB")
    return 0


def _quantized(parameters: dict[str, np.ndarray], spec: BaseSpec) -> dict[str, np.ndarray | QuantizedTensor]:
    """Weights as codes, rounded to the nearest: this happens once, so that there is no bias to add up."""
    packed: dict[str, np.ndarray | QuantizedTensor] = {}
    for name, array in parameters.items():
        if not is_worth_codes(spec.tensors[name].role, array.shape):
            packed[name] = array
            continue
        if not np.isfinite(array).all():
            raise BadCheckpoint(
                "not-finite", f"{name} holds NaN or infinity, which no integer stands for.",
                why="the fine-tuning diverged, or half precision overflowed.",
            )  # fmt: skip
        packed[name] = to_integers(array, 8)
    return packed


def _head(path: Path | None, stored: dict[str, StoredTensor], spec: BaseSpec) -> Head:
    if path is not None:
        tensors, weight, bias = dict(open_tensors(path).tensors), "weight", "bias"
    else:
        tensors, weight, bias = stored, f"{spec.head}.weight", f"{spec.head}.bias"
    if weight not in tensors:
        raise BadCheckpoint(
            "no-head",
            f"There is no {weight} in {path or 'the weights'}.",
            remedy="Give the task's classifier with --head FILE.",
        )
    w = tensors[weight].float32()
    return Head(w, tensors[bias].float32() if bias in tensors else np.zeros(len(w), np.float32))


def _array(path: Path | None, kind: type[np.generic]) -> np.ndarray | None:
    if path is None:
        return None
    try:
        array: np.ndarray = np.load(path, allow_pickle=False).astype(kind)
    except (OSError, ValueError) as error:
        raise BadCheckpoint("bad-array", f"{path} is no .npy array: {error}.") from error
    return array
