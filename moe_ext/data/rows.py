"""Rows of the global stream: which positions share a sequence, and who owns which sequences.

A cursor says where the global stream of rows stands: (position, row). It is the same for all ranks
and workers and knows nothing of their number.
"""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, order=True)
class Cursor:
    """Everything before it has been consumed, by whichever rank."""

    position: int = 0
    """First stream position of the current planning window (unpacked: the position itself)."""
    row: int = 0
    """Rows of that window already consumed (unpacked: 0)."""


class Rows(Protocol):
    """A pure function from a cursor to what follows it."""

    def take(self, cursor: Cursor, skip: int, count: int) -> list[list[int]]:
        """Stream positions of the rows `skip` .. `skip + count - 1` after a cursor."""

    def advance(self, cursor: Cursor, count: int) -> Cursor:
        """The cursor `count` rows later."""

    def room(self, position: int) -> int | None:
        """Tokens that the sample at a position may have; None: any number."""

    @property
    def identity(self) -> str:
        """What must be equal for a cursor to mean the same rows again."""


class SingleRows:
    """One sample a row."""

    def take(self, cursor: Cursor, skip: int, count: int) -> list[list[int]]:
        first = cursor.position + skip
        return [[position] for position in range(first, first + count)]

    def advance(self, cursor: Cursor, count: int) -> Cursor:
        return Cursor(cursor.position + count)

    def room(self, position: int) -> None:
        return None

    identity = "single"
