"""Every error that foldd raises on purpose.

    FolddError
    ├── BadInput            somebody sent something wrong: set it aside, go on       (quarantine)
    │   ├── BadCheckpoint       a dropped or submitted bundle
    │   ├── BadManifest         a manifest or artifact that a device must not trust
    │   └── BadRequest          a message on the bus
    ├── BadSetup            the operator must change something: configuration, base, keys
    │   └── BadConfig           one key of config.toml, with its line
    ├── Refused             the gate said no: the generation is not published        (quarantine)
    │   └── Held                it says no until somebody says yes                       (waits for a person's word)
    └── Unavailable         the environment failed: disk full, peer gone, time-out   (retry)

An error says what happened, why that is likely, and what to do about it. Whether the work is worth
repeating is a property of the error (`retry`), never of the place that catches it. `code` is stable
and short: it stands in `reason.json`, in logs and in tests.
"""

from __future__ import annotations

from typing import Any, ClassVar


class FolddError(Exception):
    """Base of the tree.

    Args:
        code: stable identifier in kebab-case, for example ``"not-finite"``.
        what: one sentence: what happened, with the names and numbers involved.
        why: the likely cause or causes.
        remedy: what the reader can do about it.
    """

    retry: ClassVar[bool] = False

    def __init__(self, code: str, what: str, *, why: str = "", remedy: str = "") -> None:
        super().__init__(code, what, why, remedy)
        self.code, self.what, self.why, self.remedy = code, what, why, remedy

    def __str__(self) -> str:
        parts = [self.what]
        if self.why:
            parts.append(f"Likely: {self.why}")
        if self.remedy:
            parts.append(f"What to do: {self.remedy}")
        return "\n  ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """The error as plain JSON values, as written to ``reason.json`` and the ledger."""
        return {"code": self.code, "what": self.what, "why": self.why, "remedy": self.remedy, "retry": self.retry}


class BadInput(FolddError):
    """Something that arrived is wrong. It will be just as wrong the next time."""


class BadCheckpoint(BadInput):
    """A bundle that cannot be folded; it goes to quarantine with its reason."""


class BadManifest(BadInput):
    """A manifest, or an artifact that does not match its manifest; the device keeps what it has."""


class BadRequest(BadInput):
    """A message on the bus that breaks the protocol."""


class BadSetup(FolddError):
    """The installation is not in order; only the operator can mend it."""


class BadConfig(BadSetup):
    """One key of the configuration is wrong. `what` names the file, the line and the key."""


class Refused(FolddError):
    """The gate found the new artifact worse than its limits; the last generation goes on serving."""


class Held(Refused):
    """A fold that would harm older tasks; it waits until somebody decides."""


class Unavailable(FolddError):
    """The environment failed us: a full disk, a peer that is gone, a time-out. Trying again may help."""

    retry: ClassVar[bool] = True
