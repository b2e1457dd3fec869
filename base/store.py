"""The base in the state directory: made once by `foldd init`, opened by every worker.

base/base.json            names, shapes, roles, digest (core.base_spec)
base/weights.safetensors  θ⁰ in float32
base/program.pt2          the feature network, cut at the feature output
base/skeleton.onnx        the same, exported
base/norms.json           which BatchNorms the skeleton has folded
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.func import functional_call
from torch.fx import GraphModule

from foldd.base.batch_norm import FoldedNorm
from foldd.base.features import cut_at_features
from foldd.base.folded import FoldedNetwork
from foldd.base.layers import find_layers
from foldd.base.lazy import Lazy
from foldd.base.load import input_shape_of
from foldd.base.network import Base, FeatureFunction
from foldd.base.roles import read_roles
from foldd.base.skeleton import export_skeleton
from foldd.base.walk import Walker
from foldd.core.base_spec import BaseSpec, TensorSpec, read_base_spec
from foldd.core.digests import base_digest
from foldd.core.errors import BadSetup
from foldd.core.files import build_file, write_file
from foldd.core.roles import Role
from foldd.core.tensorfile import StoredTensor, open_tensors, write_tensors


def store_base(directory: Path, program: ExportedProgram, *, features: str = "", head: str = "") -> BaseSpec:
    """Cuts, reads and exports the base, and writes everything that folding needs into `directory`.

    Raises:
        BadSetup: the network cannot be folded; nothing that `open_base` would accept is left.
    """
    cut = cut_at_features(program, features=features, head=head)
    module = cut.module(check_guards=False)
    assert isinstance(module, GraphModule)
    spec, weights = _describe(cut, module, program, head)
    _check_finite(weights)
    skeleton, rules = export_skeleton(cut)
    directory.mkdir(parents=True, exist_ok=True)
    build_file(directory / "weights.safetensors", lambda path: write_tensors(path, weights, {}))
    build_file(directory / "program.pt2", lambda path: _save_program(cut, path))
    write_file(directory / "skeleton.onnx", skeleton)
    write_file(directory / "norms.json", msgspec.json.encode(rules))
    spec.write(directory / "base.json")  # last: its presence says that the rest is whole
    return spec


def open_base(directory: Path) -> Base:
    """The base as the methods use it; its weights stay in the file.

    Raises:
        BadSetup: `not-initialised`, `broken-state`.
    """
    spec = read_base_spec(directory / "base.json")
    stored = open_tensors(directory / "weights.safetensors").tensors
    weights = Lazy(stored, lambda name: _read(stored[name]))
    if base_digest((name, tensor.numpy()) for name, tensor in weights.items()) != spec.digest:
        raise BadSetup(
            "broken-state",
            f"{directory / 'weights.safetensors'} is not what {directory / 'base.json'} describes.",
            why="a damaged disk, or files of two state directories mixed.",
            remedy="Run `foldd init` into a fresh state directory.",
        )
    program = torch.export.load(directory / "program.pt2")
    return Base(spec, weights, *network_of(program, forget=weights))


def network_of(
    program: ExportedProgram, *, forget: Collection[str] = ()
) -> tuple[FeatureFunction, Walker, FoldedNetwork]:
    """A captured feature network as a whole, layer by layer, and with its BatchNorms folded.

    The program's own weights are never touched.

    Args:
        forget: names of tensors that whoever runs the network will always bring: the network's own go, a whole copy of
            the model.
    """
    module = program.module(check_guards=False)
    assert isinstance(module, GraphModule)
    for name in forget:
        owner, _, leaf = name.rpartition(".")
        place = module.get_submodule(owner)
        empty = torch.empty(0)
        setattr(place, leaf, torch.nn.Parameter(empty) if leaf in place._parameters else empty)

    def features(weights: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        # functional_call, because the module shares its storage with the program: loading would change both.
        result: Tensor = functional_call(module, dict(weights), (inputs,))
        return result

    return features, Walker(module, find_layers(module)), FoldedNetwork(module)


def open_skeleton(directory: Path) -> tuple[Path, tuple[FoldedNorm, ...]]:
    """The skeleton's path and the BatchNorm rules to apply to weights before patching them in."""
    rules = msgspec.json.decode((directory / "norms.json").read_bytes(), type=tuple[FoldedNorm, ...])
    return directory / "skeleton.onnx", rules


def _read(stored: StoredTensor) -> Tensor:
    tensor = torch.empty(stored.shape)
    stored.read_into(tensor.numpy().reshape(-1))
    return tensor


def _describe(
    cut: ExportedProgram, module: GraphModule, whole: ExportedProgram, head: str
) -> tuple[BaseSpec, dict[str, np.ndarray]]:
    roles = read_roles(module)
    state = module.state_dict(keep_vars=True)
    original = whole.state_dict
    pointers = {tensor.data_ptr(): name for name, tensor in original.items() if name in state}
    tensors: dict[str, TensorSpec] = {}
    ignored = []
    for name in sorted(original, key=str.encode):
        tensor, shape = original[name], tuple(original[name].shape)
        if name in state:
            tensors[name] = TensorSpec(shape, roles[name])
        elif not tensor.is_floating_point():
            tensors[name] = TensorSpec(shape, Role.COUNTER)  # no graph in evaluation mode reads it
        elif tensor.data_ptr() in pointers:
            # Of tied tensors the graph reads one; the other names are aliases of it.
            canonical = pointers[tensor.data_ptr()]
            tensors[name] = TensorSpec(shape, roles[canonical], canonical)
        elif not head or name not in (f"{head}.weight", f"{head}.bias"):
            ignored.append(name)
    weights = {name: state[name].detach().float().numpy().copy() for name in tensors if name in state}
    width = int(next(n for n in module.graph.nodes if n.op == "output").args[0][0].meta["val"].shape[1])
    spec = BaseSpec(base_digest(weights.items()), tensors, input_shape_of(cut), width, head or None, tuple(ignored))
    return spec, weights


def _check_finite(weights: Mapping[str, np.ndarray]) -> None:
    for name, array in weights.items():
        if not np.isfinite(array).all():
            raise BadSetup("bad-base", f"The base's own tensor {name} holds values that are not finite.")


def _save_program(program: ExportedProgram, path: Path) -> None:
    # torch insists on the ending; the file is renamed to it only when it is whole.
    with path.open("wb") as file:
        torch.export.save(program, file)
