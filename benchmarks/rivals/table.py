"""The methods of `continual` by name, those of foldd and their rivals, and a digest of a method's source."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import msgspec
import torch

from benchmarks.bench_data import Bench, pixels
from benchmarks.rivals.adamerging import AdaMergingLayer, AdaMergingTask
from benchmarks.rivals.channel_masks import ChannelMasks
from benchmarks.rivals.finetune import ContinualFinetuning
from benchmarks.rivals.joint import JOINT
from benchmarks.rivals.unfolded import Unfolded
from foldd.base.network import Base
from foldd.core.roles import Role
from foldd.fusion.average import Average
from foldd.fusion.magmax import MagMax
from foldd.fusion.method import FoldMethod
from foldd.fusion.nufilt import Nufilt
from foldd.fusion.opcm import Opcm
from foldd.fusion.otmf import Otmf
from foldd.fusion.otmf_paper import OtmfPaper
from foldd.fusion.state import MergeState, empty_state
from foldd.fusion.task_arithmetic import TaskArithmetic
from foldd.fusion.ties import Ties
from foldd.fusion.tsv_m import TsvM
from foldd.fusion.uowq import Uowq

FOLLOWED = ("foldd.fusion", "foldd.base", "benchmarks.rivals")
# Methods import the network's type from here, which imports all the rest of its room: an edit of that changes no merge.
NOT_FOLLOWED = ("foldd.base.network",)


@dataclass(frozen=True)
class OpcmLinear(Opcm):
    """OPCM as published: only linear layers are projected, convolutions are summed like any other tensor."""

    name: ClassVar[str] = "opcm-linear"

    def init(self, base: Base) -> MergeState:
        # Methods go by roles: under another one a convolution is no matrix to it.
        tensors = {
            name: msgspec.structs.replace(tensor, role=Role.EMBEDDING) if tensor.role is Role.CONVOLUTION else tensor
            for name, tensor in base.spec.tensors.items()
        }
        return empty_state(replace(base, spec=msgspec.structs.replace(base.spec, tensors=tensors)))


def _finetuning(bench: Bench) -> FoldMethod:
    def labelled(task: str) -> tuple[torch.Tensor, torch.Tensor]:
        images = bench.load(task, "train")
        return pixels(images.x), torch.from_numpy(images.y)

    return ContinualFinetuning(labelled)


CONTINUAL: dict[str, Callable[[Bench], FoldMethod]] = {
    "unfolded": lambda _: Unfolded(),
    "average": lambda _: Average(),
    "task-arithmetic": lambda _: TaskArithmetic(),
    "ties": lambda _: Ties(),
    "ties-replace": lambda _: Ties(adds=False),
    "tsv-m": lambda _: TsvM(),
    "tsv-m-by-count": lambda _: TsvM(by_count=True),
    "opcm": lambda _: Opcm(),
    "opcm-linear": lambda _: OpcmLinear(),
    "nufilt": lambda _: Nufilt(),
    "magmax": lambda _: MagMax(),
    "uowq": lambda _: Uowq(),
    "adamerging-task": lambda _: AdaMergingTask(),
    "adamerging-layer": lambda _: AdaMergingLayer(),
    "otmf-paper": lambda _: OtmfPaper(),
    "otmf-channels": lambda _: ChannelMasks(),
    "otmf": lambda _: Otmf(),
    "continual-finetuning": _finetuning,
}
METHODS = (*CONTINUAL, *JOINT)


def source_digest(name: str, bench: Bench) -> str:
    """Of the source that decides what a method gives, settings included: a result of other code is stale."""
    if name in JOINT:
        start, settings = "benchmarks.rivals.joint", ""
    else:
        method = CONTINUAL[name](bench)
        start = type(method).__module__
        values = {field: getattr(method, field) for field in getattr(method, "__dataclass_fields__", {})}
        settings = repr({field: value for field, value in values.items() if not callable(value)})
        if isinstance(method, OpcmLinear):
            settings, start = settings + inspect.getsource(OpcmLinear), Opcm.__module__
    return module_digest(start, settings)


def module_digest(module: str, settings: str = "") -> str:
    """Of a module's source and all that it follows, with settings that are no part of them."""
    digest = hashlib.sha256(settings.encode())
    for path in sorted(set(_sources(module, set()))):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _sources(module: str, seen: set[str]) -> Iterator[Path]:
    """A module's file and those that it imports, as far as they can change a merge."""
    spec = importlib.util.find_spec(module)
    if module in seen or spec is None or spec.origin is None:
        return
    seen.add(module)
    path = Path(spec.origin)
    yield path
    for node in ast.walk(ast.parse(path.read_bytes())):
        module = str(node.module) if isinstance(node, ast.ImportFrom) else ""
        if module.startswith(FOLLOWED) and module not in NOT_FOLLOWED:
            yield from _sources(module, seen)
