"""File names come from strangers: made printable for logs and rows, and safe for folders of our own."""

from __future__ import annotations

import os
import re

_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_KEPT_CHARACTERS = 128
REASON = "reason.json"


def printable(name: str) -> str:
    """A name as text that every terminal, log and JSON file can take: odd bytes and control characters escaped."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def safe(name: str) -> str:
    """A file name of harmless characters, for our own folders; never that of the reason beside it."""
    short = _UNSAFE.sub("_", name)[-_KEPT_CHARACTERS:].lstrip(".") or "unnamed"
    return f"file-{short}" if short == REASON else short
