"""A source's table as a pass reads it: who writes to it, and its rows, a page at a time."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from itertools import pairwise

import asyncpg

from app.conversations.ranges import GREATEST
from app.conversations.sources.shape import Shape
from app.conversations.watermark import Look
from app.postgres import Connection

# Whoever inserts holds the first of these; the others are held by those that would write without it.
_LOOK = """
select extract(epoch from clock_timestamp())::float8 as at, pg_is_in_recovery() as is_standby,
    array(select distinct l.virtualtransaction from pg_locks l where l.locktype = 'relation'
        and l.relation = $1::text::regclass and l.database = (select oid from pg_database
            where datname = current_database())
        and l.mode in ('RowExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock'))
        as writers,
    pg_snapshot_xmin(s.now)::text::bigint as oldest, pg_snapshot_xmax(s.now)::text::bigint as next
from (select pg_current_snapshot() as now) s
"""
# Sequences that a column owns, or that its default draws from. `keeps`: a session draws several ids at once and may use
# them much later, or another server draws them. What was drawn is not known there, nor where it may not be read.
_STANDING = """
with elsewhere as (select exists (select from pg_subscription_rel where srrelid = $1::text::regclass) as is_it),
drawn as (
    select s.seqrelid, s.seqcache, s.seqincrement, s.seqstart from pg_sequence s
    join pg_depend d on d.objid = s.seqrelid
    where d.classid = 'pg_class'::regclass and d.refobjid = $1::text::regclass
    union
    select s.seqrelid, s.seqcache, s.seqincrement, s.seqstart from pg_attrdef a
    join pg_depend d on d.classid = 'pg_attrdef'::regclass and d.objid = a.oid
    join pg_sequence s on s.seqrelid = d.refobjid where a.adrelid = $1::text::regclass)
select coalesce(bool_or(seqincrement < 0), false) as falls,
    coalesce(bool_or(seqcache > 1), false) or (select is_it from elsewhere) as keeps,
    min(case when has_sequence_privilege(seqrelid, 'select') and not (select is_it from elsewhere)
        then coalesce(pg_sequence_last_value(seqrelid), seqstart - seqincrement) end) as drawn,
    coalesce(min(seqstart), 1) as first,
    (pg_relation_size($1::text::regclass) / current_setting('block_size')::int)::bigint as pages,
    pg_relation_filenode($1::text::regclass)::bigint as file,
    exists (select from pg_attribute where attrelid = $1::text::regclass and not attisdropped
        and '"' || replace(attname, '"', '""') || '"' = $2
        and atttypid in ('timestamp'::regtype, 'timestamptz'::regtype)) as is_by_time
from drawn
"""
_HIGHEST = "select max({key})::bigint from {table}"
# By their places, which is how they lie on the disk, or by a time. Ages, because ids of transactions go in a circle.
_SWEEP = """
select {reads}, ctid::text as parley_place, age(xmin) <= age($1::text::xid) as parley_is_new from {table}
where {where} {since}
"""
# Some rows, wherever they lie. `parley_is_new` as in a sweep.
_CHOSEN = """
select {reads}, age(xmin) <= age($1::text::xid) as parley_is_new from {table} where {where}
"""
_PLACES = "ctid > $2::text::tid and ctid < $3::text::tid"
_TIMES = "{time} >= to_timestamp($2::float8)"
_SINCE = "and age(xmin) <= age('{xid}'::xid)"
# Gaps in their order, and in each its rows in theirs: nothing is sorted, and a gap is one descent into the index. The
# key is the column's, not the one that is read, which bears its name and is another type: all rows would be sorted.
_PAGE = """
select r.* from unnest($1::bigint[], $2::bigint[]) as parley_gap(parley_after, parley_before)
cross join lateral (
    select {reads} from {table} parley_row
    where {key} > parley_after and {key} < parley_before order by parley_row.{key} limit $3) r
limit $3
"""

# Rows of a page, and how many characters they should have together: as many as the last ones had on average. A page of
# the longest rows that follows small ones is the most that a pass holds in memory, some 50 MB.
_FIRST, _LEAST, _MOST = 50, 8, 200
_CHARACTERS = 2 * 1024 * 1024
# Blocks of a table that one statement of a sweep reads, and the gaps that one page looks into.
_PIECE = 8192
_GAPS = 500


@dataclass(frozen=True, slots=True)
class Standing:
    """What is known of how keys are drawn, and how the table lies on the disk.

    `drawn`: the last key, where it is known, and the `first` there may be. `highest` that can be seen. `is_by_time`:
    its time has an index.
    """

    falls: bool
    keeps: bool
    drawn: int | None
    first: int
    pages: int
    file: int
    is_by_time: bool
    highest: int | None = None


@dataclass(frozen=True, slots=True)
class Page:
    """Rows in the order of their keys; nothing is left up to `position`."""

    rows: Sequence[asyncpg.Record]
    position: int


@dataclass(frozen=True, slots=True)
class Extent:
    """Rows behind a place, of transactions from `since` on; those from `new` on are told. With `earliest`: by time."""

    place: str
    pages: int
    since: int | None
    new: int
    earliest: float | None


@dataclass(frozen=True, slots=True)
class Swept:
    """Rows with their `parley_is_new`, the last of them at `place`."""

    rows: Sequence[asyncpg.Record]
    place: str


class Foreign:
    """A table of this shape over a connection that only reads, and is in no transaction: each statement sees more."""

    def __init__(self, connection: Connection, shape: Shape) -> None:
        self.shape = shape
        self._connection = connection
        self._limit = _FIRST

    async def look(self) -> Look:
        row = await self._connection.fetchrow(_LOOK, self.shape.table)
        assert row is not None
        return Look(row["at"], row["is_standby"], frozenset(row["writers"]), row["oldest"], row["next"])

    async def standing(self) -> Standing:
        shape = self.shape
        column = shape.time.column if shape.time is not None and shape.time.is_indexed else ""
        row = await self._connection.fetchrow(_STANDING, shape.table, column)
        assert row is not None
        standing = Standing(**row)
        if not shape.key.is_serial:
            return standing
        highest = await self._connection.fetchval(_HIGHEST.format(key=shape.key.column, table=shape.table))
        return replace(standing, highest=highest)

    async def pages(self, gaps: Sequence[tuple[int, int]]) -> AsyncGenerator[Page, None]:
        """Rows whose keys are in the gaps, those written meanwhile too, to the end."""
        sql = _PAGE.format(reads=", ".join(self.shape.reads), table=self.shape.table, key=self.shape.key.column)
        left = list(gaps)
        while left:
            some, limit = left[:_GAPS], self._limit
            rows = await self._connection.fetch(sql, [gap[0] for gap in some], [gap[1] for gap in some], limit)
            self._adapt(rows)
            if len(rows) < limit:
                left, position = left[_GAPS:], some[-1][1] - 1
            else:
                position = rows[-1][0]
                left = [(max(after, position), before) for after, before in left if before > position + 1]
            if any(one[0] >= other[0] for one, other in pairwise(rows)):
                raise RuntimeError("the rows of a page are out of order")
            yield Page(rows, position)

    async def swept(self, extent: Extent) -> AsyncGenerator[Swept, None]:
        """Rows of a table without serial keys, as they lie there. Each piece is a transaction that only reads."""
        if extent.earliest is not None:
            where = _TIMES.format(time=self.shape.time.column if self.shape.time else "")
            async with aclosing(self._streamed(extent, where, extent.earliest)) as pages:
                async for page in pages:
                    yield page
            return
        begin, place = int(extent.place.strip("()").partition(",")[0]), extent.place
        while begin < extent.pages:
            end = f"({begin + _PIECE},0)"
            async with aclosing(self._streamed(extent, _PLACES, place, end)) as pages:
                async for page in pages:
                    yield page
            begin, place = begin + _PIECE, end
            yield Swept((), place)

    async def chosen(
        self, where: str, given: Sequence[str], *, new: int
    ) -> AsyncGenerator[Sequence[asyncpg.Record], None]:
        """Rows with their `parley_is_new` that a condition over $2, an array of texts, finds; as one snapshot shows
        them."""
        sql = _CHOSEN.format(reads=", ".join(self.shape.reads), table=self.shape.table, where=where)
        async with self._connection.transaction(readonly=True):
            cursor = await self._connection.cursor(sql, str(_circular(new)), list(given))
            while rows := await cursor.fetch(self._limit):
                self._adapt(rows)
                yield rows

    async def _streamed(self, extent: Extent, where: str, *args: object) -> AsyncGenerator[Swept, None]:
        since = _SINCE.format(xid=_circular(extent.since)) if extent.since is not None else ""
        sql = _SWEEP.format(reads=", ".join(self.shape.reads), table=self.shape.table, where=where, since=since)
        async with self._connection.transaction(readonly=True):
            cursor = await self._connection.cursor(sql, str(_circular(extent.new)), *args)
            while rows := await cursor.fetch(self._limit):
                self._adapt(rows)
                yield Swept(rows, rows[-1]["parley_place"])

    def _adapt(self, rows: Sequence[asyncpg.Record]) -> None:
        if rows:
            characters = sum(len(value) for row in rows for value in row.values() if isinstance(value, str))
            fitting = _CHARACTERS * len(rows) // (characters + 1)
            self._limit = max(_LEAST, min(_MOST, fitting, 2 * self._limit))


def _circular(transaction: int) -> int:
    """As rows carry it, in 32 bits; the first three mean something else."""
    return max(3, transaction % 2**32)


def is_end(position: int) -> bool:
    """Whether a page was the last one of a table."""
    return position >= GREATEST - 1
