"""A source's table as a pass reads it: who writes to it, and its rows, a page at a time."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
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
# them much later, or another server draws them. Where its value may not be read it is not known.
_STANDING = """
with drawn as (
    select s.seqrelid, s.seqcache, s.seqincrement from pg_sequence s join pg_depend d on d.objid = s.seqrelid
    where d.classid = 'pg_class'::regclass and d.refobjid = $1::text::regclass
    union
    select s.seqrelid, s.seqcache, s.seqincrement from pg_attrdef a
    join pg_depend d on d.classid = 'pg_attrdef'::regclass and d.objid = a.oid
    join pg_sequence s on s.seqrelid = d.refobjid where a.adrelid = $1::text::regclass)
select coalesce(bool_or(seqincrement < 0), false) as falls,
    coalesce(bool_or(seqcache > 1), false)
        or exists (select from pg_subscription_rel where srrelid = $1::text::regclass) as keeps,
    min(case when has_sequence_privilege(seqrelid, 'select') then pg_sequence_last_value(seqrelid) end) as drawn
from drawn
"""
_HIGHEST = "select max({key})::bigint from {table}"
# Gaps in their order, and in each its rows in theirs: nothing is sorted, and a gap is one descent into the index.
_PAGE = """
select r.* from unnest($1::bigint[], $2::bigint[]) as parley_gap(parley_after, parley_before)
cross join lateral (
    select {reads} from {table} where {key} > parley_after and {key} < parley_before order by {key} limit $3) r
limit $3
"""

# Rows of a page, and how many characters they should have together: as many as the last ones had on average. A page of
# the longest rows that follows small ones is the most that a pass holds in memory, some 50 MB.
_FIRST, _LEAST, _MOST = 50, 8, 200
_CHARACTERS = 2 * 1024 * 1024
# Gaps that one page looks into.
_GAPS = 500


@dataclass(frozen=True, slots=True)
class Standing:
    """What is known of how keys are drawn. `drawn`: the last one, where it is known. `highest` that can be seen."""

    falls: bool
    keeps: bool
    drawn: int | None
    highest: int | None


@dataclass(frozen=True, slots=True)
class Page:
    """Rows in the order of their keys; nothing is left up to `position`."""

    rows: Sequence[asyncpg.Record]
    position: int


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
        row = await self._connection.fetchrow(_STANDING, self.shape.table)
        assert row is not None
        highest = await self._connection.fetchval(_HIGHEST.format(key=self.shape.key.column, table=self.shape.table))
        return Standing(row["falls"], row["keeps"], row["drawn"], highest)

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

    def _adapt(self, rows: Sequence[asyncpg.Record]) -> None:
        if rows:
            characters = sum(len(value) for row in rows for value in row.values() if isinstance(value, str))
            fitting = _CHARACTERS * len(rows) // (characters + 1)
            self._limit = max(_LEAST, min(_MOST, fitting, 2 * self._limit))


def is_end(position: int) -> bool:
    """Whether a page was the last one of a table."""
    return position >= GREATEST - 1
