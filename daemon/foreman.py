"""Looks after the worker: starts it when there is something to fold, hears it, commits what it staged, buries it.

A worker that dies, hangs or runs out of memory costs its checkpoint one attempt; what the environment broke, or the
end of the daemon, costs none.
"""

from __future__ import annotations

import logging
import selectors
import time
from collections.abc import Callable
from typing import Any

from foldd.core.errors import BadInput, Refused, Unavailable
from foldd.daemon.commit import Committer
from foldd.daemon.config import Config
from foldd.daemon.crashpoints import crash_point
from foldd.daemon.intake import Intake
from foldd.daemon.jobs import Answer, Failed, Hello, Job, Progress, Staged
from foldd.daemon.layout import Layout
from foldd.daemon.ledger import Arrival, Ledger
from foldd.daemon.live import LiveStatus
from foldd.daemon.plan import make_plan, read_pace, stored_plan
from foldd.daemon.worker_process import WorkerProcess

log = logging.getLogger("foldd")

_BACKOFF_SECONDS = (1.0, 60.0)  # first and longest wait after a failure that is worth repeating


class Foreman:
    """At most one worker, and the checkpoint that it is folding."""

    def __init__(
        self,
        config: Config,
        ledger: Ledger,
        intake: Intake,
        committer: Committer,
        live: LiveStatus,
        selector: selectors.BaseSelector,
        committed: Callable[[], None],
    ) -> None:
        """
        Args:
            selector: the worker's pipes are registered here, so that its answers wake the loop.
            committed: called after each commit, to make everything else follow the ledger.
        """
        self._config, self._settings, self._layout = config, config.settings, Layout(config.root)
        self._ledger, self._intake, self._committer, self._live = ledger, intake, committer, live
        self._selector, self._committed = selector, committed
        self._worker: WorkerProcess | None = None
        self._folding: Arrival | None = None
        self._not_before = 0.0
        self._failures = 0

    @property
    def folding(self) -> bool:
        return self._folding is not None

    def tend(self, *, may_begin: bool) -> None:
        """Hears the worker, looks after its limits, and gives it the next checkpoint; one turn, never blocking.

        Raises:
            OSError, Unavailable: a step that the disk or the ledger refused; the caller mends and turns again.
        """
        if self._worker is None:
            if may_begin and time.monotonic() >= self._not_before and self._ledger.count("queued"):
                self._start_worker()
            return
        for answer in self._worker.read():
            self._hear(answer)
        limits = self._settings.worker
        self._worker.check(
            memory_bytes=limits.memory_bytes, fold_seconds=limits.fold_seconds, stall_seconds=limits.stall_seconds
        )
        if self._worker.ended() is not None:
            for answer in self._worker.read():  # what it said last
                self._hear(answer)
            self._bury_worker()
        elif self._worker.ready and self._folding is None:
            self._next_job(may_begin)

    def _start_worker(self) -> None:
        self._worker = WorkerProcess(self._layout.root)
        self._selector.register(self._worker.answers, selectors.EVENT_READ)
        self._selector.register(self._worker.errors, selectors.EVENT_READ)
        log.debug("worker %d started", self._worker.pid)

    def _next_job(self, may_begin: bool) -> None:
        assert self._worker is not None
        queued = self._ledger.arrivals("queued")
        if not may_begin or not queued or time.monotonic() < self._not_before:
            self._dismiss_worker()
            return
        plan = make_plan(self._settings, self._config.digest, read_pace(self._layout.base))
        arrival = self._ledger.begin(queued[0].id, plan)
        crash_point("fold.begun", self._layout.root)
        self._folding = arrival
        current = self._ledger.current()
        job = Job(
            arrival=arrival.id, sha256=arrival.sha256, file=str(self._intake.file_of(arrival)), name=arrival.name,
            plan=stored_plan(arrival.plan), generation=current.generation + 1 if current else 1,
            parent=current.generation if current else None, state_sha256=current.state_sha256 if current else None,
        )  # fmt: skip
        self._live.begin(arrival.name)
        log.info("folding %s (attempt %d) into generation %d", arrival.name, arrival.attempts, job.generation)
        self._worker.hand_over(job)

    def _hear(self, answer: Answer) -> None:
        assert self._worker is not None
        match answer:
            case Hello():
                self._worker.ready = True
            case Progress():
                self._live.progress(answer.stage, answer.fraction, answer.task)
            case Staged() if self._folding and self._worker.job:
                self._commit(self._folding, self._worker.job, answer)
            case Failed():
                self._failed(answer)

    def _commit(self, arrival: Arrival, job: Job, staged: Staged) -> None:
        try:
            row = self._committer.commit(arrival, job, staged)
        except (BadInput, Refused) as error:
            self._failed(Failed("input", error.as_dict()))
            return
        except (OSError, Unavailable) as error:
            self._failed(Failed("environment", Unavailable("commit-failed", f"Committing failed: {error}.").as_dict()))
            return
        self._folding = self._worker.job = None  # type: ignore[union-attr]
        self._failures = 0
        self._live.finish()
        for warning in staged.warnings:
            log.warning("%s: %s", staged.task, warning)
        log.info(
            "generation %d: %s folded with %s in %.1f s, peak %d MB",
            row.generation, row.task, row.method, sum(row.seconds.values()) - row.seconds["settle"],
            row.peak_rss_bytes // 1_000_000,
        )  # fmt: skip
        self._committed()

    def _failed(self, answer: Failed) -> None:
        arrival, self._folding = self._folding, None
        self._live.finish(error=f"{arrival.name if arrival else 'worker'}: {answer.error.get('what')}")
        if self._worker is not None:
            self._worker.job = None
        if arrival is None:
            if self._worker is not None:
                self._worker.reported = True
            log.error("the worker cannot start: %s", answer.error.get("what"))
            self._back_off()
        elif answer.kind == "input":
            self._intake.quarantine(arrival, answer.error)
        elif answer.kind == "hold":
            self._intake.hold(arrival, answer.error)
        elif answer.kind in ("environment", "setup"):
            log.error("%s waits: %s", arrival.name, answer.error.get("what"))
            self._ledger.retreat(arrival.id, refund=True, error=answer.error)
            self._back_off()
        else:
            self._lost_attempt(arrival, answer.error)

    def _lost_attempt(self, arrival: Arrival, error: dict[str, Any]) -> None:
        if arrival.attempts >= self._settings.worker.attempts:
            self._intake.quarantine(arrival, error | {"retry": False})
            return
        log.error("%s failed on attempt %d: %s", arrival.name, arrival.attempts, error.get("what"))
        self._ledger.retreat(arrival.id, refund=False, error=error)
        self._back_off()

    def _back_off(self) -> None:
        first, longest = _BACKOFF_SECONDS
        self._not_before = time.monotonic() + min(longest, first * 2 ** min(self._failures, 16))
        self._live.waiting = True
        self._failures += 1

    def _bury_worker(self) -> None:
        worker, arrival = self._worker, self._folding
        assert worker is not None
        self._forget_worker()
        if arrival is not None:
            died = Unavailable(
                "worker-died",
                f"The worker died while it folded {arrival.name}: {worker.post_mortem()}.",
                why="out of memory, a limit of [worker], or a crash in a library.",
                remedy="Look at the log; raise the limit, or fold this checkpoint on a larger box.",
            )
            self._folding = None
            self._live.finish(error=died.what)
            self._lost_attempt(arrival, died.as_dict())
        elif not worker.ready and not worker.reported:
            self._live.last_error = f"the worker did not start: {worker.post_mortem()}"
            log.error("%s", self._live.last_error)
            self._back_off()

    def _dismiss_worker(self) -> None:
        assert self._worker is not None
        worker = self._worker
        worker.dismiss()
        self._forget_worker()
        log.debug("worker %d dismissed", worker.pid)

    def _forget_worker(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            self._selector.unregister(worker.answers)
            self._selector.unregister(worker.errors)
            worker.close()

    def stop(self) -> None:
        """A fold under way is given up: it is done again from the ledger, to the same bytes, and costs no attempt."""
        if self._worker is not None:
            self._worker.kill("the daemon stops")
        self._forget_worker()
        if self._folding is not None:
            self._ledger.retreat(self._folding.id, refund=True)
            log.info("%s goes back to the queue", self._folding.name)
            self._folding = None
