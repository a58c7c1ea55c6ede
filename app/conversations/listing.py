"""Lists of conversations, newest first or oldest first, from any place in the list at the same cost."""

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg

from app.conversations.index import OWN
from app.errors import BadRequest, Conflict
from app.postgres import Connection

# How far a total is counted, and pages are turned by number: beyond that, both cost more than anybody wants to pay.
FAR = 10_000
# Ids of messages that an entry of ours names; those of other sources are as many as the index keeps.
_IDS = 100

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_IS_THERE = "select is_there from conversation_index"
_ALL = "select coalesce(sum(conversations), 0)::bigint from conversation_counts"
_COUNT = "select count(*) from (select from conversations where {where} limit {far}) counted"
# Only the index is walked to where the page begins, and rows are read for the page alone.
_PAGE = """
with page as materialized (
    select id from conversations where {where} order by last_message_at {way}, id {way} limit {limit} offset {offset})
select c.id, c.source, c.username, c.conversation_id, c.chatbot_id, c.model, c.client_ip, c.first_message_at,
    c.last_message_at, c.message_count, c.total_tokens, c.first_question, c.last_question, c.created_at, c.updated_at,
    case when c.source = '{own}' then array(
        select m.id from messages m where m.user_id = c.username and m.chat_id = c.conversation_id and not m.is_deleted
        order by m.position desc limit {ids}) else c.message_ids end as message_ids
from page join conversations c using (id) order by c.last_message_at {way}, c.id {way}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which conversations, and from which end. Times are of the last message: from `since`, before `until`."""

    username: str | None = None
    model: str | None = None
    chatbot_id: str | None = None
    source: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    newest_first: bool = True

    @property
    def is_all(self) -> bool:
        """Whether nothing is left out."""
        return self == Wanted(newest_first=self.newest_first)


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


async def require_index(connection: Connection) -> None:
    """Raises Conflict where the index has been deleted."""
    if await connection.fetchval(_IS_THERE) is False:
        detail = "The index was deleted; POST /api/sync/init makes it anew and POST /api/sync/sync fills it."
        raise Conflict("index_missing", detail)


async def page(connection: Connection, wanted: Wanted, *, size: int, after: Place | None = None, skip: int = 0) -> Page:
    """The conversations behind a place, or behind as many as `skip` says (at most FAR)."""
    assert skip <= FAR
    await require_index(connection)
    total = after.total if after else await _total(connection, wanted)
    sql, values = statement(wanted, size=size, after=after, skip=skip)
    rows = await connection.fetch(sql, *values)
    more, rows = len(rows) > size, rows[:size]
    behind = Place(rows[-1]["last_message_at"], rows[-1]["id"], total) if more else None
    return Page(rows, total, behind)


def statement(wanted: Wanted, *, size: int, after: Place | None, skip: int) -> tuple[str, list[Any]]:
    """What reads a page and one row more, with its values."""
    terms = _terms(wanted, after)
    sql = _PAGE.format(
        where=terms.where,
        way="desc" if wanted.newest_first else "asc",
        own=OWN,
        ids=_IDS,
        limit=terms.add(size + 1),
        offset=terms.add(skip),
    )
    return sql, terms.values


async def _total(connection: Connection, wanted: Wanted) -> Total:
    if wanted.is_all:
        return Total(await connection.fetchval(_ALL))
    terms = _terms(wanted, None)
    sql = _COUNT.format(where=terms.where, far=terms.add(FAR + 1))
    count: int = await connection.fetchval(sql, *terms.values)
    return Total(count, exact=count <= FAR)


@dataclass(slots=True)
class _Terms:
    """Conditions and their values. The texts are ours, and few: one statement per combination of filters."""

    conditions: list[str] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)

    def add(self, value: Any) -> str:
        self.values.append(value)
        return f"${len(self.values)}"

    @property
    def where(self) -> str:
        return " and ".join(self.conditions) or "true"


def _terms(wanted: Wanted, after: Place | None) -> _Terms:
    terms = _Terms()
    for column in ("username", "model", "chatbot_id", "source"):
        if (value := getattr(wanted, column)) is not None:
            terms.conditions.append(f"{column} = {terms.add(value)}")
    if not terms.conditions:
        # Always true, and what the index for lists without these filters asks for.
        terms.conditions.append("message_count >= 0")
    if wanted.since is not None:
        terms.conditions.append(f"last_message_at >= {terms.add(wanted.since)}")
    if wanted.until is not None:
        terms.conditions.append(f"last_message_at < {terms.add(wanted.until)}")
    if after is not None:
        than = "<" if wanted.newest_first else ">"
        terms.conditions.append(f"(last_message_at, id) {than} ({terms.add(after.at)}, {terms.add(after.id)})")
    return terms
