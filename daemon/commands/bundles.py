"""`foldd pack`: makes a bundle out of what training code has: weights, a head, calibration arrays."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from foldd.core.base_spec import BaseSpec, read_base_spec
from foldd.core.bundle import Head, write_bundle
from foldd.core.bundle_fields import checked_task, read_head
from foldd.core.bundle_names import missing_tensors, unknown_tensors
from foldd.core.errors import BadCheckpoint, BadSetup
from foldd.core.outputs import check_output
from foldd.core.quantized import QuantizedTensor
from foldd.core.roles import Role
from foldd.core.rounding import is_worth_codes, to_integers
from foldd.core.tensorfile import TensorFile, open_tensors
from foldd.core.terminal import in_bytes
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
    config = config_of(arguments)
    layout = Layout(config.root)
    spec = read_base_spec(layout.base / "base.json")
    given = [arguments.weights, arguments.head, arguments.calibration, arguments.labels]
    inputs = [path for path in given if path is not None]
    for path in inputs:
        if not path.is_file():
            raise BadSetup("no-file", f"There is no file {path}.", remedy="Check the path.")
    check_output(arguments.output, [*inputs, config.path, *layout.base.iterdir()])
    task = arguments.task
    if task is None:
        task = checked_task(arguments.output.name.removesuffix(".safetensors"), "-o, whose stem names the task")
    else:
        checked_task(task, "--task")
    weights = open_tensors(arguments.weights)
    stored = weights.tensors
    parameters = {
        spec.tensors[name].tied_to or name: tensor.float32()
        for name, tensor in stored.items()
        if name in spec.tensors and spec.tensors[name].role is not Role.COUNTER
    }
    own = {f"{spec.head}.weight", f"{spec.head}.bias"} if spec.head else set()
    if unknown := [n for n in stored if n not in spec.tensors and n not in spec.ignored and n not in own]:
        raise unknown_tensors(arguments.weights.name, unknown)
    required = [n for n, tensor in spec.canonical.items() if tensor.role is not Role.COUNTER]
    if missing := [n for n in required if n not in parameters]:
        raise missing_tensors(arguments.weights.name, missing)
    head = _head(arguments.head, weights, spec)
    samples, classes = _samples(arguments.samples), _classes(arguments.classes, head)
    calibration = _array(arguments.calibration, "--calibration")
    labels = _labels(arguments.labels, calibration, head)
    is_delta = arguments.delta or arguments.quantize is not None
    if is_delta:
        base = open_tensors(layout.base / "weights.safetensors").tensors
        parameters = {name: array - base[name].float32() for name, array in parameters.items()}
    write_bundle(
        arguments.output,
        _quantized(parameters, spec) if arguments.quantize else parameters,
        head,
        task=task,
        base=spec,
        is_delta=is_delta,
        inputs=None if calibration is None else calibration.astype(np.float32),
        labels=labels,
        samples=samples,
        classes=classes,
    )
    print(f"{arguments.output}: {in_bytes(arguments.output.stat().st_size)}")
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


def _head(path: Path | None, weights: TensorFile, spec: BaseSpec) -> Head:
    if path is not None:
        file, weight, bias, name = open_tensors(path), "weight", "bias", f"--head {path}"
        remedy = "Save the classifier as `weight` [classes, features] and `bias` [classes]."
    else:
        own = spec.head or "(head)"
        file, weight, bias, name = weights, f"{own}.weight", f"{own}.bias", str(weights.path)
        remedy = "Give the task's classifier with --head FILE."
    if weight not in file.tensors:
        why = "" if path or spec.head else "this box's base was initialised without a head layer."
        raise BadCheckpoint("no-head", f"{name} has no {weight}.", why=why, remedy=remedy)
    return Head(*read_head(file, weight, bias, spec.features, name))


def _array(path: Path | None, option: str) -> np.ndarray | None:
    if path is None:
        return None
    try:
        array: np.ndarray = np.load(path, allow_pickle=False)
        if array.dtype.kind not in "fiub":
            raise ValueError(f"it holds {array.dtype}, no numbers")
    except (OSError, ValueError, EOFError, AttributeError) as error:
        raise BadCheckpoint(
            "bad-array",
            f"{option} {path} is no .npy array of numbers: {error}.",
            why="another kind of file, an .npz archive, or an array of Python objects.",
            remedy="Write it with numpy.save, as an array of numbers.",
        ) from error
    return array


def _labels(path: Path | None, calibration: np.ndarray | None, head: Head) -> np.ndarray | None:
    """Labels [n], int64, that fit the calibration inputs and the head."""
    labels, classes = _array(path, "--labels"), len(head.bias)
    if labels is None:
        return None
    if calibration is None:
        raise BadSetup(
            "labels-without-inputs", f"--labels {path} are labels of no inputs.",
            remedy="Give the inputs with --calibration, or leave --labels out.",
        )  # fmt: skip
    with np.errstate(invalid="ignore"):
        whole = labels.astype(np.int64)
    what = ""
    if labels.shape != calibration.shape[:1]:
        what = f"is {list(labels.shape)}, and --calibration is {list(calibration.shape)}"
    elif (labels != whole).any():
        what = "holds numbers that are not whole"
    elif wrong := [int(label) for label in whole if not 0 <= label < classes]:
        what = f"holds {wrong[0]}, and the head has classes 0…{classes - 1}"
    if what:
        raise BadCheckpoint(
            "wrong-calibration",
            f"--labels {path} {what}.",
            why="they belong to other inputs, count from 1, are one-hot, or are labels of the whole data set.",
            remedy="Give one row number of the head for each calibration input, or leave --labels out.",
        )
    return whole


def _samples(count: int | None) -> int | None:
    if count is not None and not 0 < count < 10**15:
        raise BadSetup(
            "bad-option", f"--samples {count} is no size of a training set.", remedy="Give a positive integer."
        )
    return count


def _classes(text: str | None, head: Head) -> tuple[str, ...] | None:
    if text is None:
        return None
    names, count = tuple(text.split(",")), len(head.bias)
    if len(names) != count:
        raise BadSetup(
            "bad-option",
            f"--classes names {len(names)} classes, and the head has {count}.",
            why="a comma inside a name, or the head of another task.",
            remedy="Name each row of the head once, in order, or leave --classes out; classes are then numbered.",
        )
    return names
