"""Rows that have outlived their time: counted for a look ahead, and deleted in bounded pieces.

Ages are measured by the database's clock alone.
"""

from dataclasses import dataclass
from typing import Protocol

from app.postgres import Pool

_COUNT = """
select count(*) as rows, extract(epoch from parley_now() - min(age))::float8 as age_s from (
    select {age} as age from {table}
    where {age} < parley_now() - make_interval(secs => $1) and {only} order by {age} limit $2) expired
"""
# As PostgreSQL's planner reckons; where nobody has looked yet, as in a restored backup, by a row's usual size.
ROWS = """
(case when c.relpages > 0
    then c.reltuples / c.relpages * (pg_relation_size(c.oid) / current_setting('block_size')::int)
    else pg_relation_size(c.oid) / 100 end)::bigint
"""
_ESTIMATE = f"""
select coalesce(sum({ROWS}), 0)::bigint from pg_class c where c.oid = $1::text::regclass
    or c.oid in (select relid from pg_partition_tree($1::text::regclass) where isleaf)
"""
_DELETE = """
delete from {table} where ctid = any(array(
    select ctid from {table}
    where {age} < parley_now() - make_interval(secs => $1) and {only} order by {age} limit $2 for update skip locked))
"""


@dataclass(frozen=True, slots=True)
class Expired:
    """Rows to go, counted up to a limit, and for how long the oldest of them has been due, in seconds."""

    rows: int
    late_s: float = 0


class Expiring(Protocol):
    """What goes after a time. `table` is where, `keep_s` the time in seconds."""

    @property
    def table(self) -> str: ...

    @property
    def keep_s(self) -> float: ...

    async def expired(self, pool: Pool, most: int) -> Expired:
        """Count what would go, at most up to `most` rows."""

    async def clean(self, pool: Pool, most: int) -> int:
        """Delete one piece of at most so many rows; 0 when nothing is left to do."""


async def estimate(pool: Pool, table: str) -> int:
    """About how many rows a table has, in all of its partitions."""
    rows: int = await pool.fetchval(_ESTIMATE, table)
    return rows


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of one table by a column with their age, which must lead an index; `only` is a condition in SQL.

    `piece` is how many rows one statement deletes at the most, where they are large.
    """

    table: str
    age: str
    keep_s: float
    only: str = "true"
    piece: int = 5_000

    @property
    def _parts(self) -> dict[str, str]:
        return {"table": self.table, "age": self.age, "only": self.only}

    async def expired(self, pool: Pool, most: int) -> Expired:
        row = await pool.fetchrow(_COUNT.format(**self._parts), self.keep_s, most)
        assert row is not None
        return Expired(row["rows"], row["age_s"] - self.keep_s) if row["rows"] else Expired(0)

    async def clean(self, pool: Pool, most: int) -> int:
        done = await pool.execute(_DELETE.format(**self._parts), self.keep_s, min(most, self.piece))
        return int(done.removeprefix("DELETE "))
