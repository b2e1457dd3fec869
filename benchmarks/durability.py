"""kill -9 of supervisor and worker at random moments while six checkpoints are folded: `make bench-durability`.

Each run starts with an empty box and ends when all six are folded; runs are repeated until enough kills were made. The
final merge state must have the digest of an undisturbed run.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from benchmarks.report import finish, now, options, say
from foldd.base.load import capture
from foldd.base.store import store_base

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))


def main() -> int:
    parser = options(__doc__ or "")
    parser.add_argument("--trials", type=int, default=50, help="kills in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=5.0, help="longest time between two kills in seconds")
    arguments = parser.parse_args()
    from crashes import TASKS, killed_at_random, undisturbed
    from networks import residual
    from simulator import Box

    started, trials = now(), 10 if arguments.quick else arguments.trials
    # Folds of a second or so, so that kills fall into every stage and not only between them.
    tables = {"worker": {"attempts": 1000}, "fold": {"threads": 1, "method": "otmf-paper", "otmf-paper": {"steps": 60}}}
    counts = {"supervisor": 0, "worker": 0}
    lost = doubled = 0
    violations: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        store_base(root / "base", capture(residual(), (1, 8, 8)))
        expected = undisturbed(Box(root / "undisturbed", root / "base", **tables))
        number = 0
        while sum(counts.values()) < trials:
            box = Box(root / f"run-{number}", root / "base", **tables)
            left = trials - sum(counts.values())
            try:
                outcome = killed_at_random(box, arguments.seed + number, left, arguments.longest)
            finally:
                box.kill()
            tasks = [row.task for row in box.generations()]
            lost += len(set(TASKS) - set(tasks))
            doubled += len(tasks) - len(set(tasks))
            violations += outcome.violations
            violations += [] if outcome.digest == expected else [f"run {number}: another digest"]
            for kind in outcome.kills:
                counts[kind] += 1
            number += 1
            say(f"{sum(counts.values())} of {trials} kills in {number} runs, {len(violations)} violations")
    for violation in violations:
        say(violation)
    rows = [
        {"kind": f"kill -9 {kind}", "trials": count, "lost": lost, "doubled": doubled, "violations": len(violations)}
        for kind, count in counts.items()
    ]
    finish("durability", rows, arguments.json, started)
    return 0 if not (lost or doubled or violations) else 1


if __name__ == "__main__":
    sys.exit(main())
