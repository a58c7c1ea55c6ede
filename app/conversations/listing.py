"""Lists of conversations, newest first or oldest first, from any place in the list at the same cost."""

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import chain
from typing import Any

import asyncpg

from app.conversations.index import OWN
from app.conversations.search import Look, look
from app.conversations.words import facets
from app.errors import BadRequest, Conflict
from app.postgres import Connection

# How far a total is counted, and pages are turned by number: beyond that, both cost more than anybody wants to pay.
FAR = 10_000
# Ids of messages that an entry of ours names; those of other sources are as many as the index keeps.
_IDS = 100
# A row of a walk costs a third of one that the index of words finds. Whoever walks goes so many times as far as a page
# should need, and so far at least, as not everything comes evenly; then so many times as far, until all of it costs
# what the index would. A walk that would have to be luckier than likely is not begun.
_CHEAPER, _MARGIN, _SHORT, _FARTHER, _LIKELY = 3, 4, 5_000, 8, 1.5
# How far a total of several filters, or of words, is counted where more than that is found: it would be the dearest
# part of a first page. Statistics that say so many times more are believed.
_COUNTED, _SURELY = 1_000, 3
# Always true, and what the index for lists without filters asks for.
_EVERY = "message_count >= 0"

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_IS_THERE = "select is_there from conversation_index"
_ALL = "select coalesce(sum(conversations), 0)::bigint from conversation_counts"
_COUNT = "select count(*) from (select from conversations where {where} limit {far}) counted"
# Only the index is walked to where the page begins, and rows are read for the page alone. A subquery in a condition is
# asked row by row: what has an order keeps it, and is left where the page is full.
_WALK = """
page as materialized (
    select id from conversations where {where} order by last_message_at {way}, id {way} limit {limit} offset {offset})
"""
_HAS = "(select w.words @@ {query} from conversation_words w where w.conversation = {id})"
# So far and no further: who has not found enough then looks into the index of words.
_STROLL = """
page as materialized (
    select id from (
        select id, last_message_at, username, model, chatbot_id, source from conversations where {nearby}
        order by last_message_at {way}, id {way} limit {far}) walked
    where {where} order by last_message_at {way}, id {way} limit {limit} offset {offset})
"""
# What `offset 0` keeps together is read by its key, however many PostgreSQL expects.
_FOUND = """
select c.id, c.last_message_at from conversation_words w cross join lateral (
    select id, last_message_at from conversations where id = w.conversation and {where} offset 0) c
where w.words @@ {query}
"""
_MATCHING = """
matching as materialized ({found}),
page as materialized (
    select id from matching order by last_message_at {way}, id {way} limit {limit} offset {offset})
"""
_COUNT_FOUND = "select count(*) from ({found} limit {far}) counted"
_COUNT_WORDS = "select count(*) from (select from conversation_words where words @@ {query} limit {far}) counted"
_PAGE = """
with {page}
select c.id, c.source, c.username, c.conversation_id, c.chatbot_id, c.model, c.client_ip, c.first_message_at,
    c.last_message_at, c.message_count, c.total_tokens, c.first_question, c.last_question, c.created_at, c.updated_at,
    case when c.source = '{own}' then array(
        select m.id from messages m where m.user_id = c.username and m.chat_id = c.conversation_id and not m.is_deleted
        order by m.position desc limit {ids}) else c.message_ids end as message_ids
from page cross join lateral (select * from conversations where id = page.id offset 0) c
order by c.last_message_at {way}, c.id {way}
"""


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
    def facets(self) -> dict[str, str]:
        """The filters that were given, by column; the one that leaves least comes first, as a rule."""
        named = {name: getattr(self, name) for name in ("username", "chatbot_id", "model", "source")}
        return {name: value for name, value in named.items() if value is not None}


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


async def require_index(connection: Connection) -> None:
    """Raises Conflict where the index has been deleted."""
    if await connection.fetchval(_IS_THERE) is False:
        detail = "The index was deleted; POST /api/sync/init makes it anew and POST /api/sync/sync fills it."
        raise Conflict("index_missing", detail)


async def page(connection: Connection, wanted: Wanted, *, size: int, after: Place | None = None, skip: int = 0) -> Page:
    """The conversations behind a place, or behind as many as `skip` says (at most FAR)."""
    assert skip <= FAR
    await require_index(connection)
    slice_ = Slice(size, after, skip)
    if wanted.query is None and len(wanted.facets) < 2:
        return await _walked(connection, wanted, slice_)
    first = dict(list(wanted.facets.items())[:1])
    seen = await look(connection, wanted.query or "", facets(wanted.facets), facets(first))
    if wanted.query is not None and not seen.words:
        return Page([], Total(0), None)
    if seen.is_bound:
        # Row security would ask for each of everybody's words: the user's own conversations are fewer.
        return await _walked(connection, wanted, slice_, words=seen.words)
    return await _strolled(connection, wanted, slice_, seen) or await _found(connection, wanted, slice_, seen)


async def _walked(connection: Connection, wanted: Wanted, slice_: Slice, words: str = "") -> Page:
    """From the beginning to where the page is full."""
    total = slice_.total or await _total(connection, wanted, words)
    sql, values = statement(wanted, slice_, words=words)
    return _page(await connection.fetch(sql, *values), slice_, total)


async def _strolled(connection: Connection, wanted: Wanted, slice_: Slice, seen: Look) -> Page | None:
    """Where much fits a page is full soon; None where it was not, or where the index of words is cheaper."""
    for far in _walks(slice_, seen):
        sql, values = strolling(wanted, slice_, words=seen.words, far=far)
        rows = await connection.fetch(sql, *values)
        if len(rows) > slice_.size:
            return _page(rows, slice_, slice_.total or await _total_found(connection, wanted, seen))
    return None


def _walks(slice_: Slice, seen: Look) -> list[int]:
    """How far to walk for a page, and again where what is new is unlike the rest; none where it is not worth it."""
    most = int(_CHEAPER * seen.rarest * seen.conversations)
    if not seen.within or _LIKELY * slice_.needed / seen.within > most:
        return []
    walks = [max(_SHORT, int(_MARGIN * slice_.needed / seen.within))]
    while walks[-1] * _FARTHER < most:
        walks.append(walks[-1] * _FARTHER)
    return walks if walks[0] < most else [most]


async def _found(connection: Connection, wanted: Wanted, slice_: Slice, seen: Look) -> Page:
    """All that the index of words finds, put in order. What is found this way is little, as a rule."""
    sql, values = matching(wanted, slice_, query=seen.query)
    rows = await connection.fetch(sql, *values)
    total = slice_.total or (Total(rows[0]["matching"]) if rows else None)
    if total is None:
        total = await _total_found(connection, wanted, seen) if slice_.skip else Total(0)
    return _page(rows, slice_, total)


def _page(rows: Sequence[asyncpg.Record], slice_: Slice, total: Total) -> Page:
    more, rows = len(rows) > slice_.size, rows[: slice_.size]
    behind = Place(rows[-1]["last_message_at"], rows[-1]["id"], total) if more else None
    return Page(rows, total, behind)


def statement(wanted: Wanted, slice_: Slice, *, words: str = "") -> tuple[str, list[Any]]:
    """What walks along an index to the page and one row more, with its values."""
    terms = _Terms()
    where = terms.all_of(terms.named(wanted.facets) or [_EVERY], terms.between(wanted, slice_.after), terms.has(words))
    return terms.page(_WALK, wanted, slice_, where=where)


def strolling(wanted: Wanted, slice_: Slice, *, words: str, far: int) -> tuple[str, list[Any]]:
    """Likewise, but only so far along the index of one filter, or of none."""
    terms, named = _Terms(), list(wanted.facets.items())
    nearby = terms.all_of(terms.named(dict(named[:1])) or [_EVERY], terms.between(wanted, slice_.after))
    where = terms.all_of(terms.named(dict(named[1:])), terms.has(words, "walked.id"))
    return terms.page(_STROLL, wanted, slice_, nearby=nearby, where=where, far=terms.add(far))


def matching(wanted: Wanted, slice_: Slice, *, query: str) -> tuple[str, list[Any]]:
    """What finds by words and facets, and counts what it has found."""
    terms = _Terms()
    found = terms.found(wanted, slice_.after, query)
    sql, values = terms.page(_MATCHING, wanted, slice_, found=found)
    return sql.replace("as message_ids", "as message_ids, (select count(*) from matching) as matching"), values


def counting(wanted: Wanted, *, query: str) -> tuple[str, list[Any]]:
    """What counts how many are found, up to _COUNTED and one more."""
    terms = _Terms()
    if wanted.since is None and wanted.until is None:
        return _COUNT_WORDS.format(query=terms.add(query), far=terms.add(_COUNTED + 1)), terms.values
    found = terms.found(wanted, None, query)
    return _COUNT_FOUND.format(found=found, far=terms.add(_COUNTED + 1)), terms.values


async def _total(connection: Connection, wanted: Wanted, words: str) -> Total:
    if wanted.is_all:
        return Total(await connection.fetchval(_ALL))
    terms = _Terms()
    where = terms.all_of(terms.named(wanted.facets) or [_EVERY], terms.between(wanted, None), terms.has(words))
    return _counted(await connection.fetchval(_COUNT.format(where=where, far=terms.add(FAR + 1)), *terms.values), FAR)


async def _total_found(connection: Connection, wanted: Wanted, seen: Look) -> Total:
    """At least so many. Of a single word or facet that many have the statistics are enough to know it."""
    unbounded = wanted.since is None and wanted.until is None
    if seen.terms == 1 and unbounded and seen.rarest * seen.conversations > _SURELY * _COUNTED:
        return Total(_COUNTED + 1, exact=False)
    sql, values = counting(wanted, query=seen.query)
    async with connection.transaction():
        # Whether the index is worth it depends on how common the words are; our connections plan without looking.
        await connection.execute("set local plan_cache_mode = force_custom_plan")
        return _counted(await connection.fetchval(sql, *values), _COUNTED)


def _counted(count: int, far: int) -> Total:
    return Total(count, exact=count <= far)


@dataclass(slots=True)
class _Terms:
    """Conditions and their values. The texts are ours, and few: one statement per combination of filters."""

    values: list[Any] = field(default_factory=list)

    def add(self, value: Any) -> str:
        self.values.append(value)
        return f"${len(self.values)}"

    def named(self, facets: Mapping[str, str]) -> list[str]:
        return [f"{column} = {self.add(value)}" for column, value in facets.items()]

    def between(self, wanted: Wanted, after: Place | None) -> list[str]:
        """Where a list begins is said once: of two conditions PostgreSQL might begin at the farther one."""
        since, until = wanted.since, wanted.until
        if after is not None and wanted.newest_first and until is not None:
            after, until = (after, None) if after.at < until else (None, until)
        if after is not None and not wanted.newest_first and since is not None:
            after, since = (after, None) if after.at >= since else (None, since)
        conditions = []
        if since is not None:
            conditions.append(f"last_message_at >= {self.add(since)}")
        if until is not None:
            conditions.append(f"last_message_at < {self.add(until)}")
        if after is not None:
            than = "<" if wanted.newest_first else ">"
            conditions.append(f"(last_message_at, id) {than} ({self.add(after.at)}, {self.add(after.id)})")
        return conditions

    def has(self, words: str, id_: str = "conversations.id") -> list[str]:
        return [_HAS.format(query=self.add(words), id=id_)] if words else []

    def all_of(self, *conditions: Sequence[str]) -> str:
        return " and ".join(chain.from_iterable(conditions)) or "true"

    def found(self, wanted: Wanted, after: Place | None, query: str) -> str:
        where = self.all_of(self.named(wanted.facets), self.between(wanted, after))
        return _FOUND.format(where=where, query=self.add(query))

    def page(self, which: str, wanted: Wanted, slice_: Slice, **given: str) -> tuple[str, list[Any]]:
        way = "desc" if wanted.newest_first else "asc"
        limit, offset = self.add(slice_.size + 1), self.add(slice_.skip)
        chosen = which.format(way=way, limit=limit, offset=offset, **given)
        return _PAGE.format(page=chosen, way=way, own=OWN, ids=_IDS), self.values
