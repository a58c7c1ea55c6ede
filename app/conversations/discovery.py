"""Discovery: what was written to other programs' tables is counted into the index, each row once, however late it
was committed (docs/decisions/0012). A pass reads a source in batches, each counted in one transaction of ours.
"""

from contextlib import suppress
from dataclasses import dataclass
from time import monotonic

from app.conversations import index, serial, source_state, sweep
from app.conversations.batch import Batch, Bounds, Found, Progress
from app.conversations.foreign import Foreign, Standing
from app.conversations.source_state import Outrun
from app.postgres import CONFLICT, Pool

_BOUNDS = Bounds()


@dataclass(frozen=True, slots=True)
class Discovery:
    """Counts a table's new rows into the index. Several may do it at once: only one of them counts a row."""

    pool: Pool
    bounds: Bounds = _BOUNDS

    async def discover(self, source: str, foreign: Foreign, progress: Progress | None = None) -> Found:
        """One pass over a source, in bounded time; what it has not come to is for the next one."""
        until, found = monotonic() + self.bounds.seconds, Found()
        while True:
            standing = await foreign.standing()
            with suppress(Outrun, *CONFLICT):
                batch, created = await self._count(source, foreign, standing, until)
                found.add(batch, created)
                if progress is not None:
                    progress(found)
            if found.is_complete or found.is_stuck or monotonic() > until:
                break
        return found

    async def _count(self, source: str, foreign: Foreign, standing: Standing, until: float) -> tuple[Batch, int]:
        """Read one batch and count it; returns it and how many conversations are new. Raises Outrun."""
        state = await source_state.load(self.pool, source)
        if foreign.shape.key.is_serial and not standing.falls:
            batch, new = await serial.next_batch(foreign, state, standing, bounds=self.bounds, until=until)
        else:
            batch, new = await sweep.next_batch(
                self.pool, source, foreign, state, standing, bounds=self.bounds, until=until
            )
        if new == state and not batch.rows:
            batch.is_stuck = True
            return batch, 0
        async with self.pool.acquire() as connection, connection.transaction():
            await source_state.swap(connection, source, new, rows=batch.rows, skipped=batch.skipped)
            return batch, await index.merge(connection, source, batch.summaries)
