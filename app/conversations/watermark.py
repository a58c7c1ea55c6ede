"""The settled watermark: how far a table has been read such that no row committed late is missed.

A row's id is drawn while its transaction holds a writer's lock on the table. So whoever may still commit an id up to
`hi` is among those who held one right after `hi` was seen. That is a `Mark`. When they have all gone, and everything up
to `hi` has been looked through once more, every id up to `hi` is settled.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

MOST_MARKS = 8
# How a prepared transaction is called after a restart of its server, whatever it was called before.
_PREPARED = "-1/"


@dataclass(frozen=True, slots=True)
class Look:
    """Who writes to a table at a moment. `at` in seconds of its server's clock.

    `writers` are virtual transactions, `oldest` and `next` the ids of the oldest that runs and of the next to begin.
    """

    at: float
    is_standby: bool
    writers: frozenset[str]
    oldest: int
    next: int


@dataclass(frozen=True, slots=True)
class Mark:
    """Ids up to `hi` are settled when these writers have gone. On a standby: all transactions older than `next`."""

    hi: int
    at: float
    is_standby: bool
    writers: frozenset[str]
    next: int

    def seen_again(self, look: Look) -> Self:
        """Who of them is still there. Who has gone with a restart may be prepared, and have another name."""
        gone = self.writers - look.writers
        if not gone:
            return self
        unnamed = look.writers if any(not _is_prepared(writer) for writer in gone) else frozenset[str]()
        return replace(self, writers=self.writers - gone | set(filter(_is_prepared, unnamed)))

    def is_settled(self, look: Look, *, grace_s: float) -> bool:
        """`grace_s` is for ids that are drawn before there is a lock, or, on a standby, a transaction's id."""
        if look.at - self.at < grace_s:
            return False
        return look.oldest >= self.next if self.is_standby else not self.writers

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "writers": sorted(self.writers)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        return cls(**{**value, "writers": frozenset(value["writers"])})


def _is_prepared(writer: str) -> bool:
    return writer.startswith(_PREPARED)


def settle(marks: Sequence[Mark], look: Look, *, grace_s: float) -> tuple[int | None, list[Mark]]:
    """Up to where ids are settled once they have been looked through again, and the marks as they are now."""
    seen = [mark.seen_again(look) for mark in marks if mark.is_standby == look.is_standby]
    settled = [mark.hi for mark in seen if mark.is_settled(look, grace_s=grace_s)]
    return max(settled, default=None), seen


def marked(marks: Sequence[Mark], hi: int, look: Look, *, grace_s: float) -> list[Mark]:
    """With a new mark, where it says more than the last one. `look` is later than whatever was read up to `hi`.

    At most `MOST_MARKS`: the older ones are the first to be settled, so the newest makes room.
    """
    if marks and (hi <= marks[-1].hi or look.at - marks[-1].at < grace_s / 4):
        return list(marks)
    kept = list(marks[: MOST_MARKS - 1])
    return [*kept, Mark(hi, look.at, look.is_standby, look.writers, look.next)]
