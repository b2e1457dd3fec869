"""Durable files: written beside their place, synced, renamed, and the directory synced.

After `write_file`, `place` or `point` returned, a power cut cannot undo them; before, readers see the old
content or nothing, never a part (litestream's docs/PATTERNS.md and maildir do the same).
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

_LINK_UNSUPPORTED = {errno.EPERM, errno.ENOTSUP, errno.EXDEV, errno.EMLINK, errno.ENOSYS}


def sync_directory(path: Path) -> None:
    """Makes renames inside a directory durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_file(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Replaces a file's content atomically and durably."""
    build_file(path, lambda temporary: _write(temporary, content), mode=mode)


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def build_file(path: Path, build: Callable[[Path], None], *, mode: int = 0o644) -> None:
    """Lets `build` write a temporary file beside `path`, then puts it in place durably.

    Raises:
        FileExistsError: something else than a file has the name: a rename would do away with a device or a pipe.
    """
    _check_replaceable(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    try:
        build(temporary)
        temporary.chmod(mode)
        sync_file(temporary)
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def _check_replaceable(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode) and not stat.S_ISLNK(mode):
        raise FileExistsError(errno.EEXIST, "no regular file, so none is put in its place", str(path))


def place(source: Path, target: Path) -> None:
    """Renames a file or directory whose content is already synced, durably on both ends."""
    source.rename(target)
    sync_directory(target.parent)
    if source.parent != target.parent:
        sync_directory(source.parent)


def place_new(source: Path, candidates: Iterable[Path]) -> Path:
    """Moves a synced file under the first candidate that is free, durably, and never over an existing file.

    Raises:
        FileExistsError: every candidate is taken.
    """
    for target in candidates:
        try:
            os.link(source, target)  # fails where the name is taken, which a rename does not
        except FileExistsError:
            continue
        except OSError as error:
            if error.errno not in _LINK_UNSUPPORTED:
                raise
            if target.exists():
                continue
            build_file(target, lambda temporary: _copy(source, temporary))
        source.unlink()
        sync_directory(target.parent)
        if source.parent != target.parent:
            sync_directory(source.parent)
        return target
    raise FileExistsError(errno.EEXIST, "every name for it is taken", str(source))


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


def place_directory(source: Path, target: Path) -> None:
    """Syncs everything in a flat directory and renames it into place, replacing a half-made predecessor."""
    for entry in source.iterdir():
        sync_file(entry)
    sync_directory(source)
    if target.exists():
        shutil.rmtree(target)
    place(source, target)


def point(link: Path, target: str) -> None:
    """Makes a symbolic link point elsewhere in one step."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}.part")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    place(temporary, link)
