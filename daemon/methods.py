"""The one table that turns a method's name into the method. Only the worker imports it."""

from __future__ import annotations

from typing import Any

from foldd.fusion.average import Average
from foldd.fusion.dare import Dare
from foldd.fusion.lore import Lore
from foldd.fusion.magmax import MagMax
from foldd.fusion.method import FoldMethod
from foldd.fusion.nufilt import Nufilt
from foldd.fusion.opcm import Opcm
from foldd.fusion.otmf import Otmf
from foldd.fusion.otmf_paper import OtmfPaper
from foldd.fusion.score import Score
from foldd.fusion.task_arithmetic import TaskArithmetic
from foldd.fusion.ties import Ties
from foldd.fusion.tsv_m import TsvM
from foldd.fusion.uowq import Uowq

METHODS: dict[str, type[Any]] = {
    method.name: method
    for method in (Average, Dare, Lore, MagMax, Nufilt, Opcm, Otmf, OtmfPaper, Score, TaskArithmetic, Ties, TsvM, Uowq)
}


def make_method(name: str, options: dict[str, Any]) -> FoldMethod:
    """The method of that name with options as in `[fold.<name>]`; settings have checked both."""
    method: FoldMethod = METHODS[name](**options)
    return method
