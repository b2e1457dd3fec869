"""The one table that turns a method's name into the method. Only the worker imports it."""

from __future__ import annotations

from typing import Any

from foldd.fusion.average import Average
from foldd.fusion.method import FoldMethod
from foldd.fusion.otmf import Otmf
from foldd.fusion.otmf_paper import OtmfPaper
from foldd.fusion.task_arithmetic import TaskArithmetic

METHODS: dict[str, type[Any]] = {m.name: m for m in (Average, TaskArithmetic, OtmfPaper, Otmf)}


def make_method(name: str, options: dict[str, Any]) -> FoldMethod:
    """The method of that name with options as in `[fold.<name>]`; settings have checked both."""
    method: FoldMethod = METHODS[name](**options)
    return method
