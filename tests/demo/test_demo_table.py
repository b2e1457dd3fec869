"""Figures, tables and the verdict, against numbers worked out by hand."""

from __future__ import annotations

import io
import itertools
from dataclasses import replace

import pytest

from foldd.daemon.demo.table import (
    Cost,
    Results,
    accuracy_table,
    as_dict,
    backward_transfer,
    cost_table,
    summary_table,
    verdict,
)
from foldd.daemon.progress import Progress

RESULTS = Results(
    tasks=("one", "two", "three"),
    method="otmf",
    folded=[[0.9], [0.8, 0.7], [0.7, 0.75, 0.5]],
    averaged=[[0.9], [0.7, 0.6], [0.6, 0.5, 0.4]],
    unfolded=[0.4, 0.5, 0.3],
    individual=[0.9, 0.9, 1.0],
)


def test_backward_transfer_is_the_mean_change_since_each_tasks_own_fold() -> None:
    assert backward_transfer(RESULTS.folded) == pytest.approx(((0.7 - 0.9) + (0.75 - 0.7)) / 2)
    assert backward_transfer([[0.5], [0.5, 0.1]]) == 0.0
    with pytest.raises(ValueError, match="two folds"):
        backward_transfer([[0.5]])


def test_the_accuracy_table_is_a_triangle_between_its_baselines() -> None:
    assert accuracy_table(RESULTS) == [
        "  task   unfolded |  gen 1  gen 2  gen 3 | averaged  individual",
        "  one        40.0 |   90.0   80.0   70.0 |     60.0        90.0",
        "  two        50.0 |          70.0   75.0 |     50.0        90.0",
        "  three      30.0 |                 50.0 |     40.0       100.0",
    ]


def test_the_summary_names_the_method_and_gives_transfer_where_there_is_one() -> None:
    lines = [line.split() for line in summary_table(RESULTS)]
    assert lines[1][-2:] == ["40.0", "–"]
    assert lines[2][-2:] == ["50.0", "-20.0"]
    assert lines[3] == ["foldd", "(otmf)", "65.0", "-7.5"]
    assert lines[4][-2:] == ["93.3", "–"]


def test_the_cost_leaves_the_settle_time_out() -> None:
    cost = Cost(2, "two", {"settle": 5.0, "fold": 1.25, "export": 0.25}, 73_400_000, 311_000)
    assert cost.seconds == 1.5
    assert as_dict(RESULTS, [cost])["folds"][0]["seconds"] == 1.5
    assert cost_table([cost])[1].split() == ["2", "two", "1.50", "1.25", "73", "MB", "311", "kB"]


@pytest.mark.parametrize(
    ("final", "reasons"),
    [
        ([0.6, 0.5, 0.4], []),  # as good as averaging is good enough
        ([0.6, 0.5, 0.39], ["plain averaging"]),
        ([0.4, 0.5, 0.3], ["unfolded base", "plain averaging"]),  # as good as the base is not
    ],
)
def test_the_verdict_says_what_the_fold_lost_to(final: list[float], reasons: list[str]) -> None:
    wrong = verdict(replace(RESULTS, folded=[*RESULTS.folded[:2], final]))
    assert len(wrong) == len(reasons)
    assert all(reason in text for reason, text in zip(reasons, wrong, strict=True))


def test_the_verdict_on_a_fold_that_beats_a_base_that_averaging_ruins() -> None:
    ruined = replace(RESULTS, averaged=[*RESULTS.averaged[:2], [0.1, 0.1, 0.1]])
    same, better = [0.4, 0.5, 0.3], [0.4, 0.5, 0.31]
    assert verdict(replace(ruined, folded=[*RESULTS.folded[:2], same])) == [
        "the folded model (40.0%) is on average not better than the unfolded base (40.0%)"
    ]
    assert verdict(replace(ruined, folded=[*RESULTS.folded[:2], better])) == []


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_writes_a_line_per_quarter_into_a_file() -> None:
    stream, clock = io.StringIO(), itertools.count()
    progress = Progress(stream, clock=lambda: float(next(clock)))
    for done in range(101):
        progress.update(done / 100, "work")
    progress.done("done in 3 s")
    lines = stream.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["0", "25", "50", "75", "100", "done"]
    assert lines[1] == "   25 %  work, 78 s left"


def test_progress_rewrites_one_line_on_a_terminal() -> None:
    stream, clock = _Terminal(), itertools.count()
    progress = Progress(stream, clock=lambda: 0.02 * next(clock))
    for done in range(101):
        progress.update(done / 100, "work")
    progress.done()
    assert "\n" not in stream.getvalue()
    assert 15 < stream.getvalue().count("\r") < 30  # at most one in a tenth of a second
