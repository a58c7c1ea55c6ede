"""A pass over everything that goes after a time: a piece of each table in turn, until nothing is left or time is up."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic

import structlog

from app.expiry import Expired, Expiring, estimate
from app.postgres import Pool

log = structlog.get_logger(__name__)

# Rows per statement, seconds per pass, and the pause that others get between two pieces, in seconds.
_PIECE = 5_000
_PASS_S = 30
_PAUSE_S = 0.02
# A first clean-up, or a setting lowered: so many rows that have been due for so long were nobody's business so far. An
# operator is asked, and sooner where most of the table would go. A running clean-up is never that late.
_MANY = 10_000
_LONG_S = 30 * 86400
_WEEK_S = 7 * 86400
_SHARE = 0.5
# A look ahead counts up to here.
COUNTED = 1_000_000


@dataclass(frozen=True, slots=True)
class Retention:
    """Bounded per pass; two passes at once do no harm, as each takes only rows that nobody else has locked."""

    pool: Pool
    tables: Sequence[Expiring]
    piece: int = _PIECE
    pass_s: float = _PASS_S

    async def ahead(self) -> list[tuple[Expiring, Expired]]:
        """What would go now, counted up to `COUNTED` rows for each table."""
        return [(table, await table.expired(self.pool, COUNTED)) for table in self.tables]

    async def run_once(self) -> int:
        """Clean up, except where that would be a first, huge clean-up; returns the rows deleted."""
        return await self.clean([table for table in self.tables if not await self._held(table)])

    async def clean(self, tables: Sequence[Expiring], *, until: float | None = None) -> int:
        """Clean these up, whatever there is; returns the rows deleted. `until` is monotonic time."""
        until = monotonic() + self.pass_s if until is None else until
        done, left = 0, list(tables)
        while left and monotonic() < until:
            for table in list(left):
                cleaned = await table.clean(self.pool, self.piece)
                done += cleaned
                if not cleaned:
                    left.remove(table)
            await asyncio.sleep(_PAUSE_S)
        return done

    async def _held(self, table: Expiring) -> bool:
        found = await table.expired(self.pool, _MANY + 1)
        if found.rows <= _MANY or found.late_s <= _WEEK_S:
            return False
        if found.late_s <= _LONG_S and not await self._most_of(table):
            return False
        log.warning("cleanup_held", table=table.table, late_days=round(found.late_s / 86400), remedy="parley clean")
        return True

    async def _most_of(self, table: Expiring) -> bool:
        """Whether most of its rows would go, or more than are ever counted."""
        most = min(COUNTED, int(await estimate(self.pool, table.table) * _SHARE))
        return (await table.expired(self.pool, most + 1)).rows > most
