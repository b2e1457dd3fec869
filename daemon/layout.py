"""The state directory: where everything lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from foldd.core.errors import BadSetup


@dataclass(frozen=True)
class Layout:
    """`inbox/ work/ quarantine/ blobs/ generations/ current → … ledger.sqlite3`, and the base beside them."""

    root: Path

    @property
    def inbox(self) -> Path:
        return self.root / "inbox"

    @property
    def work(self) -> Path:
        return self.root / "work"

    @property
    def claim(self) -> Path:
        """The one entry that is being taken out of the inbox."""
        return self.work / "claim"

    @property
    def incoming(self) -> Path:
        """Partial transfers of the bus."""
        return self.work / "incoming"

    @property
    def quarantine(self) -> Path:
        return self.root / "quarantine"

    @property
    def orders(self) -> Path:
        """What an operator told a daemon to do."""
        return self.root / "orders"

    @property
    def blobs(self) -> Path:
        return self.root / "blobs"

    @property
    def generations(self) -> Path:
        return self.root / "generations"

    @property
    def current(self) -> Path:
        return self.root / "current"

    @property
    def ledger(self) -> Path:
        return self.root / "ledger.sqlite3"

    @property
    def base(self) -> Path:
        return self.root / "base"

    @property
    def new_base(self) -> Path:
        """A base that `foldd init` is taking apart."""
        return self.root / "base.part"

    @property
    def old_base(self) -> Path:
        """The base that another one is just taking the place of."""
        return self.root / "base.old"

    @property
    def keys(self) -> Path:
        return self.root / "keys"

    @property
    def lock(self) -> Path:
        return self.root / "lock"

    @property
    def live(self) -> Path:
        """What the running daemon says of itself; worthless when no process holds the lock."""
        return self.root / "status.json"

    def work_item(self, sha256: str) -> Path:
        return self.work / sha256

    def stage(self, sha256: str) -> Path:
        """Where a worker builds the next generation of a checkpoint."""
        return self.work / sha256 / "stage"

    def blob(self, sha256: str) -> Path:
        return self.blobs / f"{sha256}.safetensors"

    def generation(self, number: int) -> Path:
        return self.generations / f"{number:06d}"

    def create(self) -> None:
        """Makes the folders; existing ones stay as they are.

        Raises:
            BadSetup: `two-file-systems`: nothing could be renamed from one to the other.
        """
        folders = (self.inbox, self.work, self.incoming, self.quarantine, self.blobs, self.generations)
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        for folder in folders:
            if folder.stat().st_dev != self.root.stat().st_dev:
                raise BadSetup(
                    "two-file-systems",
                    f"{folder} is on another file system than {self.root}.",
                    why="a mount or a link to another disk; a rename would not be one step there.",
                    remedy="Put the whole state directory on one file system.",
                )
