"""Which pieces of a file to ask for next: client-driven credit, without sockets or clocks.

A ROUTER drops what exceeds its high-water mark, so that the side which receives must pace the side which sends
(zguide, chapter 7): it asks for a few pieces ahead and for one more with each that comes. Pieces are taken in order
only; after a loss everything behind it is asked for again, which costs at most one window and needs no bookkeeping.
"""

from __future__ import annotations

from foldd.core.wire import CHUNK_BYTES, CREDIT


class PullWindow:
    """A file of `size` bytes on its way; `done` bytes have been taken."""

    def __init__(self, size: int, done: int = 0, chunk_bytes: int = CHUNK_BYTES, credit: int = CREDIT) -> None:
        self.size, self.done = size, done
        self._chunk, self._credit = chunk_bytes, credit
        self._asked = done
        self._repeating = False  # lost pieces have been asked for again, and none of them has come yet

    @property
    def complete(self) -> bool:
        return self.done >= self.size

    def wanted(self) -> list[tuple[int, int]]:
        """(offset, length) of the pieces to ask for now; the caller asks for all of them."""
        pieces = []
        while self._asked < self.size and self._asked - self.done < self._credit * self._chunk:
            length = min(self._chunk, self.size - self._asked)
            pieces.append((self._asked, length))
            self._asked += length
        return pieces

    def accept(self, offset: int, length: int) -> bool:
        """Whether a piece is the next one; if so it counts as taken.

        Pieces come in order, so that one from further on tells of a loss; one from before is a stale duplicate.
        """
        if offset > self.done and not self._repeating:
            self.restart()
            self._repeating = True
        expected = min(self._chunk, self.size - self.done)
        if offset != self.done or not 0 < length <= expected:
            return False
        self.done += length
        self._asked, self._repeating = max(self._asked, self.done), False
        if length < expected:  # the other side sends smaller pieces than we ask for
            self._chunk = length
            self.restart()
            self._repeating = True
        return True

    def restart(self) -> None:
        """Nothing came for a while: what was asked for is lost."""
        self._asked = self.done
