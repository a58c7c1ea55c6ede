"""The day partitions of the log, made ahead of their day; a stream's id says which one it lives in."""

from datetime import UTC, datetime, timedelta
from uuid import UUID

import structlog

from app.postgres import Pool

log = structlog.get_logger(__name__)

# The name of a partition: this and its day.
PREFIX = "streaming_events_"
_LOCK = 0x7061_726C_6579_0002
_TODAY = "select parley_now()"
# Made beside the log and attached: CREATE TABLE … PARTITION OF would lock the whole log against appends.
_MAKE = """
create table {name} (like streaming_events including all);
alter table streaming_events attach partition {name} for values from ('{low}') to ('{high}')
"""


class Partitions:
    """There is no DEFAULT partition: one row in it would keep that day's partition from ever being made."""

    def __init__(self, pool: Pool, *, days_ahead: int) -> None:
        self._pool = pool
        self._days_ahead = days_ahead

    async def run_once(self) -> list[str]:
        """Make what is missing from yesterday (the database's clock may step back) on; returns the names made."""
        now: datetime = await self._pool.fetchval(_TODAY)
        today = now.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        days = [today + timedelta(days=n) for n in range(-1, self._days_ahead + 1)]
        made = [_name(day) for day in days if await self._make(day)]
        if made:
            log.info("partitions_made", partitions=made)
        return made

    async def _make(self, day: datetime) -> bool:
        if await self._exists(day):
            return False
        statement = _MAKE.format(name=_name(day), low=first_id(day), high=first_id(day + timedelta(days=1)))
        async with self._pool.acquire() as connection, connection.transaction():
            await connection.execute("select pg_advisory_xact_lock($1)", _LOCK)
            if await self._exists(day):
                return False
            await connection.execute(statement)
        return True

    async def _exists(self, day: datetime) -> bool:
        found: bool = await self._pool.fetchval("select to_regclass($1) is not null", _name(day))
        return found


def _name(day: datetime) -> str:
    return f"{PREFIX}{day:%Y%m%d}"


def first_id(moment: datetime) -> UUID:
    """The least UUID whose first 48 bits are this moment in milliseconds."""
    return UUID(int=int(moment.timestamp() * 1000) << 80)
