"""From a staged folder to a committed generation: blob, folder, ledger, link. And what recovery makes of the rest."""

from __future__ import annotations

import os
import shutil
import time

from foldd.core.errors import Refused
from foldd.core.files import place, place_directory, point, write_file
from foldd.core.manifest import MAX_MANIFEST_BYTES, Manifest, TaskEntry, read_manifest, sign_manifest
from foldd.core.signatures import Identity
from foldd.daemon.crashpoints import crash_point
from foldd.daemon.jobs import Job, Staged
from foldd.daemon.layout import Layout
from foldd.daemon.ledger import Arrival, GenerationRow, Ledger, now


class Committer:
    """Makes staged generations real; the ledger's transaction in the middle is the commit point."""

    def __init__(self, layout: Layout, ledger: Ledger, identity: Identity, base_digest: str, *, keep: int) -> None:
        self._layout, self._ledger, self._identity = layout, ledger, identity
        self._base, self._keep = base_digest, keep

    def commit(self, arrival: Arrival, job: Job, staged: Staged) -> GenerationRow:
        """Commits what a worker staged; `settle_files` comes next. Cut anywhere, it is either done or undone.

        Raises:
            Refused: `manifest-too-large`.
            Unavailable: `ledger-failed`.
            OSError: a file could not be placed.
        """
        started, root = time.monotonic(), self._layout.root
        stage = self._layout.stage(job.sha256)
        created = now()
        tasks = self._tasks() | {staged.task: TaskEntry(staged.classes, job.sha256, staged.class_names)}
        manifest = Manifest(
            generation=job.generation, parent=job.parent, base=self._base, method=staged.method,
            config_digest=job.plan.config_digest, tasks=tasks, artifact=staged.artifact, scores=staged.scores,
            created=created,
        )  # fmt: skip
        signed = sign_manifest(manifest, self._identity)
        if len(signed) > MAX_MANIFEST_BYTES:
            raise Refused(
                "manifest-too-large",
                f"With {staged.task} the manifest would have {len(signed)} bytes, the limit is {MAX_MANIFEST_BYTES}.",
                why="very many tasks, or class names that take hundreds of kilobytes.",
                remedy="Leave foldd.classes out of bundles with thousands of classes.",
            )
        write_file(stage / "manifest.json", signed)
        crash_point("commit.manifest-written", root)
        place(stage / "state.safetensors", self._layout.blob(staged.state_sha256))
        crash_point("commit.blob-placed", root)
        place_directory(stage, self._layout.generation(job.generation))
        crash_point("commit.generation-placed", root)
        seconds = {"settle": round(arrival.settle_seconds, 6), **staged.seconds}
        row = GenerationRow(
            generation=job.generation, parent=job.parent, arrival=arrival.id, task=staged.task, method=staged.method,
            checkpoint_sha256=job.sha256, artifact_sha256=staged.artifact.sha256, state_sha256=staged.state_sha256,
            config_digest=job.plan.config_digest, manifest=signed, scores=staged.scores,
            seconds=seconds | {"commit": round(time.monotonic() - started, 6)}, peak_rss_bytes=staged.peak_rss_bytes,
            published=False, created=created,
        )  # fmt: skip
        self._ledger.commit(row)
        crash_point("commit.committed", root)
        return row

    def settle_files(self) -> None:
        """Makes links and folders say what the ledger says: after each commit, and after a crash."""
        rows = self._ledger.latest(self._keep)
        if rows:
            self._point_at(rows[0].generation)
        crash_point("commit.current-pointed", self._layout.root)
        self._prune(rows)

    def _point_at(self, generation: int) -> None:
        target = str(self._layout.generation(generation).relative_to(self._layout.root))
        if not self._layout.current.is_symlink() or os.readlink(self._layout.current) != target:
            point(self._layout.current, target)

    def _prune(self, rows: list[GenerationRow]) -> None:
        """Removes what no committed generation within the retention needs: old ones, and a crash's orphans."""
        folders = {self._layout.generation(row.generation).name for row in rows}
        blobs = {self._layout.blob(row.state_sha256).name for row in rows[:2]}
        for folder, kept in ((self._layout.generations, folders), (self._layout.blobs, blobs)):
            for entry in folder.iterdir():
                if entry.name not in kept:
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        if rows:
            shutil.rmtree(self._layout.work_item(rows[0].checkpoint_sha256), ignore_errors=True)

    def _tasks(self) -> dict[str, TaskEntry]:
        row = self._ledger.current()
        return dict(read_manifest(row.manifest).manifest.tasks) if row else {}
