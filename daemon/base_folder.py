"""The base's folder: made beside its place, then put there whole, so that a base that is served is never half a one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from foldd.core.files import place, sync_directory
from foldd.daemon.layout import Layout


def restore_base(layout: Layout) -> None:
    """Undoes a replacement that a crash has cut."""
    if layout.old_base.exists() and not layout.base.exists():
        place(layout.old_base, layout.base)
    for left in (layout.old_base, layout.new_base):
        shutil.rmtree(left, ignore_errors=True)


@contextmanager
def replaced_base(layout: Layout) -> Iterator[Path]:
    """An empty folder that takes the base's place when the block ends; where it raises, all stays as it was."""
    layout.new_base.mkdir()
    try:
        yield layout.new_base
        sync_directory(layout.new_base)
        if layout.base.exists():
            place(layout.base, layout.old_base)
        place(layout.new_base, layout.base)
    finally:
        restore_base(layout)
