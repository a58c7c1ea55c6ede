"""What a list of conversations is asked for, and what it gives: filters, a slice, a total, the place behind a page."""

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import asyncpg

from app.errors import BadRequest

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which conversations, and from which end. Times are of the last message: from `since`, before `until`."""

    username: str | None = None
    model: str | None = None
    chatbot_id: str | None = None
    source: str | None = None
    query: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    newest_first: bool = True

    @property
    def is_all(self) -> bool:
        """Whether nothing is left out."""
        return self == Wanted(newest_first=self.newest_first)

    @property
    def is_bounded(self) -> bool:
        """Whether times are given."""
        return self.since is not None or self.until is not None

    @property
    def facets(self) -> dict[str, str]:
        """The filters that were given, by column; the one that leaves least comes first, as a rule."""
        named = {name: getattr(self, name) for name in ("username", "chatbot_id", "model", "source")}
        return {name: value for name, value in named.items() if value is not None}

    @property
    def along(self) -> dict[str, str]:
        """The filter whose conversations are walked along: a user's, or without words the first. Else there is none."""
        return dict(list(self.facets.items())[:1]) if self.username is not None or self.query is None else {}


@dataclass(frozen=True, slots=True)
class Total:
    """How many there are; where `exact` is false, at least so many."""

    count: int
    exact: bool = True


@dataclass(frozen=True, slots=True)
class Place:
    """Behind a conversation in a list, with the list's total as it was at its beginning."""

    at: datetime
    id: int
    total: Total

    def told(self, *, newest_first: bool) -> str:
        """As a client gets it: opaque, and good for a list in the same order."""
        micros = (self.at - _EPOCH) // timedelta(microseconds=1)
        parts = ("d" if newest_first else "a", micros, self.id, self.total.count, int(self.total.exact))
        return base64.urlsafe_b64encode(".".join(map(str, parts)).encode()).decode().rstrip("=")


def place(cursor: str, *, newest_first: bool) -> Place:
    """What `Place.told` has told. Raises BadRequest for anything else, or for a list in the other order."""
    refused = BadRequest("bad_cursor", "cursor is none of a list in this order; begin without one.")
    try:
        way, *numbers = base64.b64decode(cursor + "=" * (-len(cursor) % 4), b"-_", validate=True).decode().split(".")
        micros, id_, count, exact = map(int, numbers)
        at = _EPOCH + timedelta(microseconds=micros)
    except (binascii.Error, ValueError, OverflowError):
        raise refused from None
    if way != ("d" if newest_first else "a") or not 0 <= id_ < 1 << 63 or not 0 <= count < 1 << 63:
        raise refused
    return Place(at, id_, Total(count, bool(exact)))


@dataclass(frozen=True, slots=True)
class Page:
    """Rows of a list; `behind` is where the next page begins, None at the end."""

    rows: Sequence[asyncpg.Record]
    total: Total
    behind: Place | None

    @classmethod
    def of(cls, rows: Sequence[asyncpg.Record], slice_: "Slice", total: Total) -> "Page":
        """The rows of a slice, of which one more tells whether there is more; the total is that of its first page."""
        total = slice_.total or total
        more, rows = len(rows) > slice_.size, rows[: slice_.size]
        return cls(rows, total, Place(rows[-1]["at"], rows[-1]["id"], total) if more else None)


@dataclass(frozen=True, slots=True)
class Slice:
    """Which part of a list: so many, behind a place or behind as many as `skip` says."""

    size: int
    after: Place | None = None
    skip: int = 0

    @property
    def needed(self) -> int:
        """How many have to be found: one more tells whether there is more."""
        return self.skip + self.size + 1

    @property
    def total(self) -> Total | None:
        """As the list's first page has told it."""
        return self.after.total if self.after else None
