"""Lists of conversations, newest first or oldest first, from any place in the list at the same cost."""

from collections.abc import Sequence
from dataclasses import replace
from math import inf, isqrt

import asyncpg

from app.conversations.list_statements import (
    counting,
    counting_newest,
    counting_walked,
    matching,
    near,
    strolling,
    walking,
)
from app.conversations.pages import Page, Place, Slice, Total, Wanted
from app.conversations.search import Look, look
from app.conversations.words import facets
from app.errors import Conflict
from app.postgres import Connection

# How far a total is counted, and pages are turned by number: beyond that, both cost more than anybody wants to pay.
FAR = 10_000
# What one row costs, in µs: one that the index of words finds, and what it looks through before; one of a walk along
# the words, and along the conversations of a filter, of which the index says everything; and its words, where they are
# asked for by its key. In memory that takes 1.2, but each is a page that nobody has asked for ahead. At last, a time
# that is put beside what the index of words finds: 0.2, and 0.7 where VACUUM has not been since.
_FOUND_US, _LOOKED_US = 2.5, 0.2
_READ_US, _NAMED_US, _ASKED_US = 0.4, 0.3, 3.0
_TIMED_US = 0.3
# A walk goes as far as costs what the index of words would, and so far at least, as not everything comes evenly. One
# that would have to be luckier than likely is not begun. Words come in bursts: of one that is only guessed at more is
# looked through.
_SHORT, _LIKELY, _BURSTS = 5_000, 1.5, 3
# How far a total of several filters, or of words, is counted where more than that is found: it would be the dearest
# part of a first page. Statistics that say so many times more are believed.
_COUNTED, _SURELY = 1_000, 3
# Where the index of words would look through more than this, what is newest is counted instead: so many rows of it, and
# fewer where each one's words are asked for by its key.
_LOOKED, _NEWEST, _NEWEST_ASKED = 25_000, 10_000, 2_500

_IS_THERE = "select is_there from conversation_index"
_ALL = "select coalesce(sum(conversations), 0)::bigint from conversation_counts"


async def require_index(connection: Connection, rows: Sequence[asyncpg.Record] = ()) -> None:
    """Raises Conflict where the index has been deleted. Rows of a list say it themselves, without a round trip."""
    is_there = rows[0]["index_is_there"] if rows else await connection.fetchval(_IS_THERE)
    if is_there is False:
        detail = "The index was deleted; POST /api/sync/init makes it anew and POST /api/sync/sync fills it."
        raise Conflict("index_missing", detail)


async def page(connection: Connection, wanted: Wanted, *, size: int, after: Place | None = None, skip: int = 0) -> Page:
    """The conversations behind a place, or behind as many as `skip` says (at most FAR)."""
    assert skip <= FAR
    found = await _page(connection, wanted, Slice(size, after, skip))
    await require_index(connection, found.rows)
    return found


async def _page(connection: Connection, wanted: Wanted, slice_: Slice) -> Page:
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
    sql, values = walking(wanted, slice_, words=words)
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
    if not wanted.along:
        found_us = min(found_us, _near_us(slice_, seen))
    # What the index of words finds is counted with it; a walk needs the index for that.
    counted_us = _found_us(seen, most=_COUNTED) if slice_.total is None and _is_asked(wanted, seen) else 0.0
    if not seen.within or _LIKELY * slice_.needed / seen.within * row_us + counted_us > found_us:
        return 0
    return max(_SHORT, int(found_us / row_us))


def _found_us(seen: Look, *, most: float = inf) -> float:
    """What it costs to have the index of words find so many."""
    return _LOOKED_US * seen.most + _FOUND_US * min(seen.share_asked * seen.conversations, most)


async def _found(connection: Connection, wanted: Wanted, slice_: Slice, seen: Look) -> Page:
    """What the index of words finds, put in order: all of it where that is little, else what is among the next rows."""
    total, is_blind = slice_.total, seen.is_guess
    if wanted.along or (total is not None and total.count <= _COUNTED):
        return (await _matching(connection, wanted, slice_, seen))[0]
    # Among few times there may be nothing of what is found at any.
    if total is None and (_is_asked(wanted, seen) or (is_blind and not wanted.is_bounded)):
        few, told = await _matching(connection, wanted, slice_, seen, far=_COUNTED + 1)
        if told["matching"] <= _COUNTED:
            return few
        total, seen, is_blind = Total(told["matching"], exact=False), _as_dense_as(told, seen), False
    if is_blind or _near_us(slice_, seen) < _found_us(seen):
        nearest = await _near(connection, wanted, slice_, seen, total)
        if nearest is not None:
            return nearest
    return (await _matching(connection, wanted, slice_, seen))[0]


async def _matching(
    connection: Connection, wanted: Wanted, slice_: Slice, seen: Look, *, far: int | None = None
) -> tuple[Page, asyncpg.Record]:
    """Of all that the index of words finds, or of so many of it; and what is told of those."""
    sql, values = matching(wanted, slice_, seen, far=far)
    rows, told = _parted(await connection.fetch(sql, *values))
    return Page.of(rows, slice_, Total(told["matching"])), told


def _parted(rows: list[asyncpg.Record]) -> tuple[list[asyncpg.Record], asyncpg.Record]:
    """A page's rows, and one that has what is told of all; without an id it stands for an empty page."""
    return [row for row in rows if row["id"] is not None], rows[0]


def _as_dense_as(told: asyncpg.Record, seen: Look) -> Look:
    """How common it is what only some were found of: those are the first ones in the order of the table's blocks."""
    if not seen.conversations:
        return seen
    (first, _), (last, _) = told["first"], told["last"]
    share = min(told["matching"] / (last - first + 1) * seen.blocks / seen.conversations, 1.0)
    asked = min(share * (seen.share_asked / seen.share if seen.share else 1.0), 1.0)
    return replace(seen, share=share, share_asked=asked, within=share)


async def _near(connection: Connection, wanted: Wanted, slice_: Slice, seen: Look, total: Total | None) -> Page | None:
    """What the index of words finds among those that come first; None where the page was not full then."""
    far = _how_near(slice_, seen)
    sql, values = near(wanted, slice_, seen, far=far)
    rows, told = _parted(await connection.fetch(sql, *values))
    if len(rows) <= slice_.size:
        if not told["is_all"]:
            return None
        total = total or Total(told["matching"])
    return Page.of(rows, slice_, total or await _total_found(connection, wanted, seen, least=slice_.needed))


def _how_near(slice_: Slice, seen: Look) -> int:
    """Among how many to look for a page: no farther than where that costs as much as all that is found, if the page is
    just full then."""
    likely = _BURSTS if seen.is_guess else _LIKELY
    fair = isqrt(int(slice_.needed * seen.conversations * (_FOUND_US + _LOOKED_US) / _TIMED_US))
    return int(min(likely * slice_.needed / seen.share, fair)) if seen.share else fair


def _near_us(slice_: Slice, seen: Look) -> float:
    """What it costs to have the index of words find what is that near."""
    row_us = _TIMED_US + _FOUND_US * seen.share_asked
    return _LOOKED_US * seen.most + row_us * _how_near(slice_, seen)


async def _total(connection: Connection, wanted: Wanted, words: str) -> Total:
    if wanted.is_all:
        return Total(await connection.fetchval(_ALL))
    sql, values = counting_walked(wanted, words=words, far=FAR + 1)
    return _counted(await connection.fetchval(sql, *values), FAR)


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
    sql, values = counting(wanted, seen, far=_COUNTED + 1)
    return _counted(await connection.fetchval(sql, *values), _COUNTED)


async def _total_newest(connection: Connection, wanted: Wanted, seen: Look | None = None) -> Total:
    """Exact where all were looked at."""
    far = _NEWEST_ASKED if wanted.along and seen and seen.words else _NEWEST
    sql, values = counting_newest(wanted, seen, far=far)
    row = await connection.fetchrow(sql, *values)
    assert row is not None
    return Total(row["found"], exact=row["walked"] < far)


def _is_known(wanted: Wanted, seen: Look) -> bool:
    """Whether statistics say that there are more than anybody counts."""
    is_named = seen.terms == 1 and not seen.is_guess
    return is_named and not wanted.is_bounded and seen.most > _SURELY * _COUNTED


def _is_asked(wanted: Wanted, seen: Look) -> bool:
    """Whether the index of words is asked for the total: not where that is known, or is looked for along a walk."""
    if _is_known(wanted, seen) or ("username" in wanted.along and not seen.words):
        return False
    # It finds what has the words at any time, which may be much more than between two.
    is_apart = wanted.is_bounded and not wanted.along
    return seen.most <= (_SURELY * _COUNTED if is_apart else _LOOKED)


def _counted(count: int, far: int) -> Total:
    return Total(count, exact=count <= far)
