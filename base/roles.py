"""Reading each tensor's role from the captured graph: what the tensor does there, not what it is called."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch.fx import GraphModule, Node

from foldd.core.roles import Role

# operator → role of its tensor arguments by position
_ROLES: dict[str, dict[int, Role]] = {
    "aten.linear": {1: Role.MATRIX, 2: Role.BIAS},
    "aten.addmm": {0: Role.BIAS, 1: Role.MATRIX, 2: Role.MATRIX},
    "aten.mm": {0: Role.MATRIX, 1: Role.MATRIX},
    "aten.bmm": {0: Role.MATRIX, 1: Role.MATRIX},
    "aten.matmul": {0: Role.MATRIX, 1: Role.MATRIX},
    "aten.embedding": {0: Role.EMBEDDING},
    "aten.batch_norm": {1: Role.NORM, 2: Role.NORM, 3: Role.STATISTIC, 4: Role.STATISTIC},
    "aten.layer_norm": {2: Role.NORM, 3: Role.NORM},
    "aten.group_norm": {2: Role.NORM, 3: Role.NORM},
    "aten.instance_norm": {1: Role.NORM, 2: Role.NORM, 3: Role.STATISTIC, 4: Role.STATISTIC},
    "aten.rms_norm": {2: Role.NORM},
}
_CONVOLUTIONS = ("aten.conv", "aten.convolution", "aten._convolution")
_PASS_THROUGH = (
    "aten.t.",
    "aten.transpose",
    "aten.permute",
    "aten.view",
    "aten.reshape",
    "aten.to.",
    "aten.contiguous",
)


def read_roles(module: GraphModule) -> dict[str, Role]:
    """Tensor name → role, for every parameter and buffer of a captured module, aliases of tied ones included.

    A tensor that no known operator takes is an embedding where it has two or more dimensions (class tokens,
    position embeddings: added or concatenated to activations) and a bias where it has one.
    """
    state = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    roles: dict[str, Role] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr" and isinstance(state.get(str(node.target)), torch.Tensor):
            found = next(_roles_in(node, node.users), None)
            if found is not None:
                roles[str(node.target)] = found
    by_tensor = {id(state[name]): role for name, role in roles.items()}
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            roles[name] = Role.COUNTER
        elif name not in roles:
            fallback = Role.EMBEDDING if tensor.dim() > 1 else Role.BIAS
            roles[name] = by_tensor.get(id(tensor), fallback)
    return {name: roles[name] for name in state}


def _roles_in(node: Node, users: Iterable[Node]) -> Iterator[Role]:
    for user in users:
        operator = str(user.target)
        if operator.startswith(_PASS_THROUGH):
            yield from _roles_in(user, user.users)
            continue
        position = next((i for i, argument in enumerate(user.args) if argument is node), None)
        if position is None:
            continue
        if operator.startswith(_CONVOLUTIONS):
            yield Role.CONVOLUTION if position == 1 else Role.BIAS
        elif role := _ROLES.get(".".join(operator.split(".")[:2]), {}).get(position):
            yield role
