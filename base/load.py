"""Loading the operator's base network: a `torch.export` archive, or a factory with `.safetensors` weights.

The `.pt2` loader and a factory can both execute code. They are for the operator at `foldd init` only; nothing
that comes through the inbox or the bus ever gets here.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from foldd.core.errors import BadSetup
from foldd.core.tensorfile import open_tensors

_WEIGHTS_ALONE = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".npz")
SEED = 0  # of the example input; only its shape matters


def load_program(
    source: str, *, weights: Path | None = None, input_shape: tuple[int, ...] | None = None
) -> ExportedProgram:
    """The base as an exported program with a free batch dimension, in evaluation mode.

    Args:
        source: `model.pt2`, `package.module:factory` or `path/to/file.py:factory`.
        weights: `.safetensors` for what the factory makes; required with a factory.
        input_shape: one sample's shape, without the batch; required with a factory.

    Raises:
        BadSetup: with the reason and the remedy.
    """
    if source.endswith(".pt2"):
        program = _load_archive(Path(source))
    else:
        _check_is_factory(source)
        if weights is None or not input_shape:
            raise BadSetup(
                "base-incomplete",
                f"{source} names a factory, which needs weights and an input shape.",
                remedy="Add --weights base.safetensors and --input-shape 3,224,224, or set them under [base].",
            )
        model = _call_factory(source)
        _load_weights(model, weights)
        program = capture(model, input_shape)
    _check_inference(program, source)
    return program


def capture(model: nn.Module, input_shape: tuple[int, ...]) -> ExportedProgram:
    """Exports a module with a free batch, in evaluation mode and float32."""
    example = torch.randn(2, *input_shape, generator=torch.Generator().manual_seed(SEED))
    try:
        return torch.export.export(
            model.eval().float(), (example,), dynamic_shapes=({0: Dim("batch", min=1, max=65536)},)
        )
    except Exception as error:
        raise BadSetup(
            "base-not-exportable",
            f"torch.export cannot capture the base: {_first_line(error)}",
            why="control flow on data, or a fixed batch size somewhere in forward().",
            remedy="Make `torch.export.export(model, (x,), dynamic_shapes=({0: Dim('batch')},))` work first.",
        ) from error


def input_shape_of(program: ExportedProgram) -> tuple[int, ...]:
    """One sample's shape, read from the program's only input."""
    names = program.graph_signature.user_inputs
    nodes = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    if len(nodes) != 1:
        raise BadSetup(
            "base-inputs",
            f"The base takes {len(nodes)} inputs; foldd folds networks with one tensor input.",
            remedy="Wrap it in a module whose forward takes one tensor.",
        )
    shape = nodes[0].meta["val"].shape
    if isinstance(shape[0], int):
        raise BadSetup(
            "base-fixed-batch",
            f"The base was exported with a fixed batch of {shape[0]}.",
            remedy="Export it with dynamic_shapes=({0: torch.export.Dim('batch')},).",
        )
    return tuple(int(n) for n in shape[1:])


def _load_archive(path: Path) -> ExportedProgram:
    if not path.is_file():
        raise BadSetup(
            "no-base", f"There is no file {path}.", remedy="Name the .pt2 file that torch.export.save wrote."
        )
    try:
        return torch.export.load(path)
    except Exception as error:
        raise BadSetup(
            "bad-base",
            f"{path} is no torch.export archive that this torch {torch.__version__} can load: {_first_line(error)}",
            why="a TorchScript or pickle file under this name, or one saved by a newer torch.",
            remedy="Save it with torch.export.save, or use package.module:factory with --weights.",
        ) from error


def _check_is_factory(source: str) -> None:
    place, _, name = source.rpartition(":")
    if place and name:
        return
    if source.endswith(_WEIGHTS_ALONE):
        what = f"{source} is no base network: it holds weights, and not the network that they belong to."
        remedy = "Name the network with --base path/to/file.py:factory, and its weights with --weights base.safetensors"
        remedy += "." if source.endswith(".safetensors") else " (pickles are not read)."
    else:
        what, remedy = f"{source!r} names no base network.", "Use package.module:factory or path/to/file.py:factory."
    raise BadSetup("bad-base", what, remedy=f"{remedy} Or give model.pt2, as torch.export.save writes it.")


def _call_factory(source: str) -> nn.Module:
    place, _, name = source.rpartition(":")
    try:
        module = _import_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
        model: Any = getattr(module, name)()
    except Exception as error:
        file = Path(*place.split(".")).with_suffix(".py")
        if isinstance(error, ModuleNotFoundError) and error.name == place.partition(".")[0] and file.is_file():
            remedy = f"Write {file}:{name}: modules are looked for among the installed packages, not in this folder."
        else:
            remedy = (
                "It must be importable, callable without arguments, and return the network; try it in Python first."
            )
        raise BadSetup(
            "bad-base", f"{source} could not be called: {type(error).__name__}: {error}.", remedy=remedy
        ) from error
    if not isinstance(model, nn.Module):
        raise BadSetup(
            "bad-base",
            f"{source} returned a {type(model).__name__}, not a torch.nn.Module.",
            remedy="Let the factory return the network itself.",
        )
    return model


def _import_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _load_weights(model: nn.Module, path: Path) -> None:
    if not path.is_file():
        raise BadSetup("no-weights", f"There is no file {path}.")
    stored = open_tensors(path).tensors
    own = model.state_dict()
    missing = [name for name, tensor in own.items() if name not in stored and tensor.is_floating_point()]
    unknown = [name for name in stored if name not in own]
    if missing or unknown:
        raise BadSetup(
            "wrong-weights",
            f"{path} does not fit the network: missing {missing[:3]}, unknown {unknown[:3]}.",
            remedy="Save the network's own state_dict(); integer counters may be left out.",
        )
    with torch.no_grad():
        for name, tensor in own.items():
            if name in stored:
                value = stored[name]
                if value.shape != tuple(tensor.shape):
                    raise BadSetup(
                        "wrong-weights", f"{path}: {name} is {value.shape}, the network's is {tuple(tensor.shape)}."
                    )
                array: Tensor = torch.from_numpy(value.float32() if value.is_float else value.stored().copy())
                tensor.copy_(array)


def _check_inference(program: ExportedProgram, source: str) -> None:
    """A program that was captured in training mode would update its statistics and drop activations."""
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        name, arguments = str(node.target), node.args
        training = (name.startswith("aten.batch_norm") and arguments[5] is True) or (
            name.startswith("aten.dropout") and len(arguments) > 2 and arguments[2] is True
        )
        if training:
            raise BadSetup(
                "base-in-training",
                f"{source} was exported in training mode ({name} trains).",
                remedy="Call model.eval() before torch.export.export.",
            )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
