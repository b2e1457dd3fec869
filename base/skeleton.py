"""The ONNX skeleton: the feature network exported once; afterwards only its initializers change.

torch's ordinary dynamo export folds, transposes and deduplicates initializers, so that patching one could change
another. Exported with `optimize=False` from a network whose tensors are all different, names map one to one;
that they do is checked here, bit by bit, before the skeleton is accepted.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from foldd.base.batch_norm import FoldedNorm, fold_graph
from foldd.base.load import input_shape_of
from foldd.base.simplify import simplify
from foldd.core.errors import BadSetup

OPSET = 21  # Gelu and LayerNormalization as one node; INT4 initializers
INPUT, FEATURES = "input", "features"
_SEED = 1


def export_skeleton(program: ExportedProgram) -> tuple[bytes, tuple[FoldedNorm, ...]]:
    """Exports the feature network.

    Args:
        program: as `cut_at_features` gives it.

    Returns:
        The serialised ONNX model (input `input` [batch, …], output `features` [batch, width]; its initializers
        have the names of `fold_norms`' result) and the BatchNorm rules to apply to weights before patching.

    Raises:
        BadSetup: `skeleton-not-patchable` where an initializer is not exactly one tensor of the network.
    """
    module = copy.deepcopy(program.module(check_guards=False))
    assert isinstance(module, GraphModule)
    rules = fold_graph(module)
    _scramble(module)
    shape = input_shape_of(program)
    example = torch.randn(2, *shape, generator=torch.Generator().manual_seed(_SEED))
    exported = torch.onnx.export(
        module.eval(),
        (example,),
        dynamo=True,
        optimize=False,
        opset_version=OPSET,
        input_names=[INPUT],
        output_names=[FEATURES],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=65536)},),
        external_data=False,
        verbose=False,
    )
    assert exported is not None
    model = exported.model_proto
    simplify(model)
    _strip(model)
    _check_patchable(model, {name: t.numpy() for name, t in module.state_dict().items() if t.is_floating_point()})
    return model.SerializeToString(deterministic=True), rules


def _scramble(module: nn.Module) -> None:
    """Makes all tensors different, so that no two can be taken for one."""
    generator = torch.Generator().manual_seed(_SEED)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)


def _strip(model: onnx.ModelProto) -> None:
    """Removes stack traces, doc strings and the paths of the machine that exported."""
    model.doc_string = ""
    model.producer_name, model.producer_version = "foldd", ""
    del model.metadata_props[:]
    graph = model.graph
    graph.name, graph.doc_string = "foldd", ""
    del graph.metadata_props[:]
    del graph.value_info[:]
    for node in graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    for tensor in graph.initializer:
        tensor.doc_string = ""
        del tensor.metadata_props[:]
    for value in [*graph.input, *graph.output]:
        value.doc_string = ""
        del value.metadata_props[:]


def _check_patchable(model: onnx.ModelProto, tensors: Mapping[str, np.ndarray]) -> None:
    stored = {initializer.name: numpy_helper.to_array(initializer) for initializer in model.graph.initializer}
    wrong = [
        name
        for name, tensor in tensors.items()
        if name not in stored or stored[name].shape != tensor.shape or not np.array_equal(stored[name], tensor)
    ]
    if wrong:
        raise BadSetup(
            "skeleton-not-patchable",
            f"The ONNX export changed {len(wrong)} tensors, among them {wrong[0]}.",
            why="an operator whose export transposes, splits or computes with its weights.",
            remedy="Report the architecture; meanwhile write that layer with plain linear and convolution layers.",
        )
