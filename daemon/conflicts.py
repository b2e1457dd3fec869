"""When a fold would make older tasks worse: who is hurt, how it is said, and what is then to be done.

How well a task is kept is measured where the artifact is served: the share of the calibration inputs at hand on which
its head decides as it did in the last generation. The previous task is asked on inputs of its own. Of older ones no
input is left; they are asked on what others left, which tells less: strange inputs lie nearer to the borders between
classes, so the share is lower than on the task's own (docs/merge-quality.md says by how much).
"""

from __future__ import annotations

from collections.abc import Mapping

from foldd.core.errors import Held, Refused

RETAINED = "retained/"


def find_conflicts(scores: Mapping[str, float], limit: float) -> dict[str, float]:
    """Task → share kept, of those under the limit, the worst first."""
    found = {name.removeprefix(RETAINED): share for name, share in scores.items() if name.startswith(RETAINED)}
    return {task: share for task, share in sorted(found.items(), key=lambda item: item[1]) if share < limit}


def describe(task: str, conflicts: Mapping[str, float]) -> str:
    """One sentence for the operator."""
    worst = ", ".join(f"{name} ({share:.0%})" for name, share in list(conflicts.items())[:5])
    more = f" and {len(conflicts) - 5} more" if len(conflicts) > 5 else ""
    return f"{task} conflicts with {worst}{more}: so few of their decisions stay as they were."


def decide(task: str, conflicts: Mapping[str, float], on_conflict: str) -> tuple[str, ...]:
    """Warnings for a fold that goes on.

    Args:
        on_conflict: `fold`, `hold` or `refuse`.

    Raises:
        Held: `conflict`, to be folded only if somebody says so.
        Refused: `conflict`.
    """
    if not conflicts:
        return ()
    what = describe(task, conflicts)
    if on_conflict == "fold":
        return (what,)
    why = "it needs the same features for other decisions, or its task vector is very long."
    if on_conflict == "hold":
        remedy = "`foldd retry ID` folds it all the same, `foldd forget ID` drops it; others are folded meanwhile."
        raise Held("conflict", what, why=why, remedy=remedy)
    remedy = (
        "Fine-tune it more gently (docs/fine-tuning.md), or lower gate.conflict; the last generation goes on serving."
    )
    raise Refused("conflict", what, why=why, remedy=remedy)
