"""Lists of conversations, newest first or oldest first, from any place in the list at the same cost."""

from dataclasses import dataclass, replace
from math import inf
from typing import Any

from app.conversations.index import OWN
from app.conversations.pages import Page, Place, Slice, Total, Wanted
from app.conversations.search import Look, look
from app.conversations.terms import ENTRY, EVERY, OWN_IDS, Terms
from app.conversations.words import facets
from app.errors import Conflict
from app.postgres import Connection

# How far a total is counted, and pages are turned by number: beyond that, both cost more than anybody wants to pay.
FAR = 10_000
# What one row costs, in µs: one that the index of words finds, and what it looks through before; one of a walk along
# the words, and along the conversations of a filter, of which the index says everything; and its words, where they are
# asked for by its key. In memory that takes 1.2, but each is a page that nobody has asked for ahead.
_FOUND_US, _LOOKED_US = 2.5, 0.2
_READ_US, _NAMED_US, _ASKED_US = 0.4, 0.3, 3.0
# A walk goes as far as costs what the index of words would, and so far at least, as not everything comes evenly. One
# that would have to be luckier than likely is not begun.
_SHORT, _LIKELY = 5_000, 1.5
# How far a total of several filters, or of words, is counted where more than that is found: it would be the dearest
# part of a first page. Statistics that say so many times more are believed.
_COUNTED, _SURELY = 1_000, 3
# Where the index of words would look through more than this, what is newest is counted instead, so many rows of it.
_LOOKED, _NEWEST = 25_000, 10_000

_IS_THERE = "select is_there from conversation_index"
_ALL = "select coalesce(sum(conversations), 0)::bigint from conversation_counts"
_COUNT = "select count(*) from (select from conversations where {where} limit {far}) counted"
# Only the index is walked to where the page begins, and rows are read for the page alone. A subquery in a condition is
# asked row by row: what has an order keeps it, and is left where the page is full.
_WALK = """
page as materialized (
    select id, last_message_at as at from conversations where {where}
    order by last_message_at {way}, id {way} limit {limit} offset {offset})
"""
_HAS = "(select w.words @@ {query} from conversation_words w where w.conversation = {id})"
# So far and no further, along the conversations of one filter or along the words of all.
_NEARBY = """
select id, last_message_at as at, model, chatbot_id, source from conversations where {nearby}
order by last_message_at {way}, id {way} limit {far}
"""
_SPOKEN = """
select conversation as id, said_at as at, words from conversation_words where {nearby}
order by said_at {way}, conversation {way} limit {far}
"""
_STROLL = """
page as materialized (
    select id, at from ({walk}) walked where {where} order by at {way}, id {way} limit {limit} offset {offset})
"""
_COUNT_NEWEST = "select count(*) filter (where {where}) as found, count(*) as walked from ({walk}) walked"
# What the index of words finds is put in order by what stands beside the words; `offset 0` keeps another index out of
# it, which would find half of all. Whether a conversation is gone, or has a longer name than a facet, says its own row.
_IS = "(select {named} from conversations c where c.id = found.id)"
_MATCHING = """
matching as materialized (
    select conversation as id, said_at as at from (
        select conversation, said_at, username from conversation_words where words @@ {query} offset 0) all_of_it
    where {where}),
page as materialized (
    select id, at from (select id, at from matching order by at {way}, id {way}) found where {is_it}
    limit {limit} offset {offset})
"""
_COUNT_WORDS = """
select count(*) from (select from conversation_words where words @@ {query} and {where} limit {far}) counted
"""
_PAGE = f"""
with {{page}}
select {ENTRY}, case when c.source = '{OWN}' then {OWN_IDS} else c.message_ids end as message_ids
from page cross join lateral (select * from conversations where id = page.id offset 0) c
order by page.at {{way}}, page.id {{way}}
"""


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
    newest = None
    if wanted.query is None and wanted.username is not None:
        newest = slice_.total or await _total_newest(connection, wanted)
        if newest.exact and (own := await _own(connection, wanted, slice_, newest)):
            return own
    seen = await look(connection, wanted.query or "", facets(wanted.facets), facets(wanted.along))
    if wanted.query is not None and not seen.words:
        return Page([], Total(0), None)
    if seen.is_bound:
        # Row security would ask for each of everybody's words: the user's own conversations are fewer.
        return await _walked(connection, wanted, slice_, words=seen.words)
    strolled = await _strolled(connection, wanted, slice_, seen, newest)
    return strolled or await _found(connection, wanted, slice_, seen)


async def _walked(connection: Connection, wanted: Wanted, slice_: Slice, words: str = "") -> Page:
    """From the beginning to where the page is full."""
    total = slice_.total or await _total(connection, wanted, words)
    sql, values = statement(wanted, slice_, words=words)
    return Page.of(await connection.fetch(sql, *values), slice_, total)


async def _own(connection: Connection, wanted: Wanted, slice_: Slice, total: Total) -> Page | None:
    """Of a user with few enough conversations to walk along all of them; None where that is not known to be so."""
    # More than were counted: some may have come since.
    sql, values = strolling(wanted, slice_, far=2 * _NEWEST)
    rows = await connection.fetch(sql, *values)
    # A cursor does not say how far its total was counted, but a page that is full is as it should be.
    is_whole = slice_.total is None or len(rows) > slice_.size
    return Page.of(rows, slice_, total) if is_whole else None


async def _strolled(
    connection: Connection, wanted: Wanted, slice_: Slice, seen: Look, newest: Total | None
) -> Page | None:
    """Where much fits a page is full soon; None where it was not, or where the index of words is cheaper."""
    if not (far := _far(wanted, slice_, seen)):
        return None
    sql, values = strolling(wanted, slice_, seen, far=far)
    rows = await connection.fetch(sql, *values)
    if len(rows) <= slice_.size:
        return None
    if (total := slice_.total) is None:
        total = await _total_found(connection, wanted, seen, least=slice_.needed, newest=newest)
    return Page.of(rows, slice_, total)


def _far(wanted: Wanted, slice_: Slice, seen: Look) -> int:
    """How far to walk for a page; 0 where it is not worth it."""
    row_us = _READ_US
    if wanted.along:
        row_us = _ASKED_US if seen.words else _NAMED_US
    found_us = _found_us(seen)
    # What the index of words finds is counted with it; a walk needs the index for that.
    counted_us = _found_us(seen, most=_COUNTED) if slice_.total is None and _is_asked(wanted, seen) else 0.0
    if not seen.within or _LIKELY * slice_.needed / seen.within * row_us + counted_us > found_us:
        return 0
    return max(_SHORT, int(found_us / row_us))


def _found_us(seen: Look, *, most: float = inf) -> float:
    """What it costs to have the index of words find so many."""
    return _LOOKED_US * seen.rarest * seen.conversations + _FOUND_US * min(seen.share * seen.conversations, most)


async def _found(connection: Connection, wanted: Wanted, slice_: Slice, seen: Look) -> Page:
    """All that the index of words finds, put in order. What is found this way is little, as a rule."""
    sql, values = matching(wanted, slice_, query=seen.query)
    rows = await connection.fetch(sql, *values)
    total = slice_.total or (Total(rows[0]["matching"]) if rows else None)
    if total is None:
        total = await _total_found(connection, wanted, seen) if slice_.skip else Total(0)
    return Page.of(rows, slice_, total)


def statement(wanted: Wanted, slice_: Slice, *, words: str = "") -> tuple[str, list[Any]]:
    """What walks along an index to the page and one row more, with its values."""
    terms = _Terms()
    where = terms.all_of(terms.named(wanted.facets) or [EVERY], terms.between(wanted, slice_.after), terms.has(words))
    return terms.page(_WALK, wanted, slice_, where=where)


def strolling(wanted: Wanted, slice_: Slice, seen: Look | None = None, *, far: int) -> tuple[str, list[Any]]:
    """Likewise, but only so far along the index of one filter, or along the words."""
    terms = _Terms()
    walk, where = terms.nearby(wanted, slice_.after, seen, far)
    if not wanted.along:
        where += f" and {_IS.format(named=terms.is_named(wanted)).replace('found.', 'walked.')}"
    return terms.page(_STROLL, wanted, slice_, walk=walk, where=where)


def matching(wanted: Wanted, slice_: Slice, *, query: str) -> tuple[str, list[Any]]:
    """What finds by words and facets, and counts what it has found."""
    terms = _Terms()
    where, is_it = terms.spoken(wanted, slice_.after), _IS.format(named=terms.is_named(wanted))
    sql, values = terms.page(_MATCHING, wanted, slice_, query=terms.add(query), where=where, is_it=is_it)
    return sql.replace("as message_ids\n", "as message_ids, (select count(*) from matching) as matching\n"), values


def counting(wanted: Wanted, *, query: str) -> tuple[str, list[Any]]:
    """What counts how many are found, up to _COUNTED and one more."""
    terms = _Terms()
    where = terms.spoken(wanted, None)
    return _COUNT_WORDS.format(query=terms.add(query), where=where, far=terms.add(_COUNTED + 1)), terms.values


def counting_newest(wanted: Wanted, seen: Look | None = None, *, far: int) -> tuple[str, list[Any]]:
    """What counts among so many of those that a walk would come to first."""
    terms = _Terms()
    walk, where = terms.nearby(wanted, None, seen, far)
    return _COUNT_NEWEST.format(walk=walk, where=where), terms.values


async def _total(connection: Connection, wanted: Wanted, words: str) -> Total:
    if wanted.is_all:
        return Total(await connection.fetchval(_ALL))
    terms = _Terms()
    where = terms.all_of(terms.named(wanted.facets) or [EVERY], terms.between(wanted, None), terms.has(words))
    return _counted(await connection.fetchval(_COUNT.format(where=where, far=terms.add(FAR + 1)), *terms.values), FAR)


async def _total_found(
    connection: Connection, wanted: Wanted, seen: Look, *, least: int = 0, newest: Total | None = None
) -> Total:
    """At least so many. Of a single word or facet that many have the statistics are enough to know it. `newest` is
    what a walk along the newest has counted, where there was one."""
    if _is_known(wanted, seen):
        return Total(_COUNTED + 1, exact=False)
    if not _is_asked(wanted, seen):
        newest = newest or await _total_newest(connection, wanted, seen)
        return replace(newest, count=max(newest.count, least))
    sql, values = counting(wanted, query=seen.query)
    async with connection.transaction():
        # Whether the index is worth it depends on how common the words are; our connections plan without looking.
        await connection.execute("set local plan_cache_mode = force_custom_plan")
        return _counted(await connection.fetchval(sql, *values), _COUNTED)


async def _total_newest(connection: Connection, wanted: Wanted, seen: Look | None = None) -> Total:
    """Exact where all were looked at."""
    sql, values = counting_newest(wanted, seen, far=_NEWEST)
    row = await connection.fetchrow(sql, *values)
    assert row is not None
    return Total(row["found"], exact=row["walked"] < _NEWEST)


def _is_known(wanted: Wanted, seen: Look) -> bool:
    """Whether statistics say that there are more than anybody counts."""
    unbounded = wanted.since is None and wanted.until is None
    return seen.terms == 1 and unbounded and seen.rarest * seen.conversations > _SURELY * _COUNTED


def _is_asked(wanted: Wanted, seen: Look) -> bool:
    """Whether the index of words is asked for the total: not where that is known, or is looked for along a walk."""
    is_along = seen.rarest * seen.conversations > _LOOKED or ("username" in wanted.along and not seen.words)
    return not (is_along or _is_known(wanted, seen))


def _counted(count: int, far: int) -> Total:
    return Total(count, exact=count <= far)


@dataclass(slots=True)
class _Terms(Terms):
    """Those that ask for words, and along which index a list is walked."""

    def has(self, words: str, id_: str = "conversations.id") -> list[str]:
        return [_HAS.format(query=self.add(words), id=id_)] if words else []

    def spoken(self, wanted: Wanted, after: Place | None) -> str:
        """Of words. A facet holds the beginning of a name; whose they are is never left to that."""
        user = {name: value for name, value in wanted.facets.items() if name == "username"}
        return self.all_of(self.named(user), self.between(wanted, after, "said_at", "conversation"))

    def is_named(self, wanted: Wanted) -> str:
        return self.all_of(self.named({name: value for name, value in wanted.facets.items() if name != "username"}))

    def nearby(self, wanted: Wanted, after: Place | None, seen: Look | None, far: int) -> tuple[str, str]:
        """A walk, and which of its rows are wanted. Words are asked for in what was seen of them."""
        way = "desc" if wanted.newest_first else "asc"
        if not wanted.along:
            assert seen is not None
            walk = _SPOKEN.format(nearby=self.spoken(wanted, after), way=way, far=self.add(far))
            return walk, f"words @@ {self.add(seen.query)}"
        nearby = self.all_of(self.named(wanted.along), self.between(wanted, after))
        rest = {name: value for name, value in wanted.facets.items() if name not in wanted.along}
        where = self.all_of(self.named(rest), self.has(seen.words if seen else "", "walked.id"))
        return _NEARBY.format(nearby=nearby, way=way, far=self.add(far)), where

    def page(self, which: str, wanted: Wanted, slice_: Slice, **given: str) -> tuple[str, list[Any]]:
        way = "desc" if wanted.newest_first else "asc"
        limit, offset = self.add(slice_.size + 1), self.add(slice_.skip)
        chosen = which.format(way=way, limit=limit, offset=offset, **given)
        return _PAGE.format(page=chosen, way=way), self.values
