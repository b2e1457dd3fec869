"""kill -9 at every named point and at random moments: all six folded once, and to the same bytes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from crashes import (
    TASKS,
    all_folded,
    crash_points_taken,
    drop_all,
    finished,
    killed_at_random,
    undisturbed,
    violations,
)
from simulator import Box

from foldd.daemon.crashpoints import SUPERVISOR_POINTS, VARIABLE, WORKER_POINTS

PATIENT = {"attempts": 100}


@pytest.fixture(scope="module")
def expected(tmp_path_factory, base_folder):
    """The final digest when nobody kills anything."""
    box = Box(tmp_path_factory.mktemp("undisturbed"), base_folder("residual"), worker=PATIENT)
    try:
        yield undisturbed(box)
    finally:
        box.kill()


@pytest.mark.timeout(900)
def test_killed_at_every_named_point(make_box, expected):
    """One state directory, a crash at each point in turn; a bad file each for the points of the quarantine."""
    box: Box = make_box(worker=PATIENT)
    for point in SUPERVISOR_POINTS:
        if point.startswith("quarantine"):
            (box.layout.inbox / f"{point}.txt").write_text(f"bad, for {point}")
    drop_all(box)
    for point in SUPERVISOR_POINTS:
        process = box.start(**{VARIABLE: point})
        box.wait(lambda p=process: p.poll() is not None, f"the crash at {point}")
        assert violations(box) == [], point
        if point in ("commit.manifest-written", "commit.blob-placed", "commit.generation-placed"):
            assert not all_folded(box)
    for point in WORKER_POINTS:
        if all_folded(box):
            box = make_box(name=f"box-{point}", worker=PATIENT)
            drop_all(box)
        # Only weights are quantized there, in one fold: the merge state, and its digest, are what they always are.
        box.configure(worker=PATIENT, quantize={"format": "w8" if point == "quantize" else "float"})
        box.start(**{VARIABLE: point})
        box.wait(lambda p=point, b=box: p in crash_points_taken(b), f"the crash at {point}")
        assert box.process.poll() is None, "a worker's death is not the daemon's"
        box.kill()
        assert violations(box) == [], point
    box.configure(worker=PATIENT)
    box.start()
    box.wait(lambda: all_folded(box), "six folds")
    assert box.stop() == 0
    wrong = [w for w in finished(box) if not w.startswith("arrivals")]
    assert wrong == []
    assert [a.state for a in box.arrivals()].count("folded") == len(TASKS)
    assert box.generations()[-1].state_sha256 == expected


@pytest.mark.timeout(900)
def test_killed_at_random_moments(make_box, expected):
    outcome = killed_at_random(make_box(worker=PATIENT), seed=1, trials=8, longest_s=6.0)
    assert outcome.violations == []
    assert outcome.kills
    assert outcome.digest == expected


def test_every_crash_point_is_listed_and_every_listed_one_exists():
    source = "".join(path.read_text() for path in (Path(__file__).parents[2] / "daemon").glob("*.py"))
    named = set(re.findall(r'crash_point\("([^"]+)"', source))
    assert named == set(SUPERVISOR_POINTS) | set(WORKER_POINTS)
