"""The log's old days: whole partitions are detached and dropped, never one that an unfinished stream lives in.

Streams are born with today's ids, so a day that has none unfinished stays that way. A reader of a dropped day is told
(410): its page is one statement, which sees all of a partition or nothing.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import asyncpg
import structlog

from app.expiry import ROWS, Expired
from app.postgres import Connection, Pool, open_connection
from app.streams.partitions import PREFIX, first_id

log = structlog.get_logger(__name__)

# Attached or not: one that was detached and not dropped, because somebody stopped us in between, is still there.
_DAYS = f"""
select c.relname as name, {ROWS} as rows, i.inhparent is not null as attached,
       coalesce(i.inhdetachpending, false) as pending, parley_now() as now
from pg_class c left join pg_inherits i on i.inhrelid = c.oid
where c.relnamespace = to_regnamespace(current_schema()::text) and c.relkind = 'r' and c.relname like $1
order by c.relname
"""
# Through the small index of unfinished streams; asked by id, the planner might walk over all finished ones.
_UNFINISHED = """
with unfinished as materialized (select id from streaming_sessions where status in ('queued', 'active'))
select exists (select from unfinished where id >= $1 and id < $2)
"""
# Nobody waits behind us for longer than this; another pass comes.
_PATIENCE = "set lock_timeout = '100ms'"

# Somebody reads it just now, another one's detaching is not finished, or another pass was faster.
_BUSY = (
    asyncpg.LockNotAvailableError,
    asyncpg.ObjectInUseError,
    asyncpg.ObjectNotInPrerequisiteStateError,
    asyncpg.UndefinedTableError,
    TimeoutError,
)
_DAY = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class _Day:
    name: str
    # None where another pass drops it just now: then it has no size any more.
    rows: int | None
    attached: bool
    pending: bool
    day: datetime
    now: datetime

    @property
    def age_s(self) -> float:
        """Of its youngest event, at the least."""
        return (self.now - self.day - timedelta(days=1)).total_seconds()


@dataclass(frozen=True, slots=True)
class Events:
    """The day partitions of `streaming_events`; `keep_s` counts from a day's end."""

    dsn: str
    keep_s: float
    table: str = "streaming_events"

    async def expired(self, pool: Pool, most: int) -> Expired:
        """Rows are an estimate: nobody counts whole days of the log."""
        old = await self._old(pool)
        return (
            Expired(max(sum(day.rows or 0 for day in old), len(old)), old[0].age_s - self.keep_s) if old else Expired(0)
        )

    async def clean(self, pool: Pool, most: int) -> int:
        """Drop the oldest day that may go, whatever its size; the rows that were in it, or 1 where nobody counted."""
        for day in await self._old(pool):
            if day.attached and await pool.fetchval(_UNFINISHED, first_id(day.day), first_id(day.day + _DAY)):
                log.warning("partition_in_use", partition=day.name)
                continue
            if await self._drop(day):
                return max(day.rows or 0, 1)
        return 0

    async def _old(self, pool: Pool) -> list[_Day]:
        rows = await pool.fetch(_DAYS, f"{PREFIX}%")
        days = [_Day(day=_day_of(row["name"]), **row) for row in rows if row["name"].removeprefix(PREFIX).isdigit()]
        return [day for day in days if day.age_s > self.keep_s]

    async def _drop(self, day: _Day) -> bool:
        connection = await open_connection(self.dsn)
        try:
            await connection.execute(_PATIENCE)
            await _detach(connection, day)
            await connection.execute(f"drop table {day.name}")
        except _BUSY as error:
            log.info("partition_kept", partition=day.name, reason=type(error).__name__)
            return False
        finally:
            await connection.close()
        log.info("partition_dropped", partition=day.name, events=day.rows)
        return True


async def _detach(connection: Connection, day: _Day) -> None:
    if day.pending:
        await connection.execute(f"alter table streaming_events detach partition {day.name} finalize")
    elif day.attached:
        await connection.execute(f"alter table streaming_events detach partition {day.name} concurrently")


def _day_of(name: str) -> datetime:
    return datetime.strptime(name.removeprefix(PREFIX), "%Y%m%d").replace(tzinfo=UTC)
