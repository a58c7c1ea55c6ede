"""Discovery: what was written to other programs' tables is counted into the index, each row once, however late it
was committed (docs/decisions/0012). A pass reads a source in batches, each counted in one transaction of ours.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from time import monotonic

import asyncpg
import structlog

from app.conversations import index, source_state
from app.conversations.foreign import Foreign, Standing, is_end
from app.conversations.ranges import LEAST, Ranges
from app.conversations.source_state import Outrun, State
from app.conversations.sources.shape import Shape, Skipped
from app.conversations.summary import KEYS, Summaries, fold
from app.conversations.watermark import Look, marked, settle
from app.postgres import CONFLICT, Pool

log = structlog.get_logger(__name__)

# Gaps among the ids that are kept open where a session draws ids long before it uses them.
_PATIENCE = 1_000
# Ranges above the watermark: more of them, and a pass waits for those who hold it. Of 16 bytes each.
_MOST_RANGES = 50_000


@dataclass(frozen=True, slots=True)
class Bounds:
    """Of one pass over one source, and of one batch of it. `grace_s`: see `Mark.is_settled`."""

    seconds: float = 30
    sessions: int = 500
    rows: int = 20_000
    grace_s: float = 10
    standby_grace_s: float = 60

    def grace_of(self, look: Look) -> float:
        return self.standby_grace_s if look.is_standby else self.grace_s


@dataclass(slots=True)
class Found:
    """What a pass over a source has found so far. `sessions` in which something was new, `created` new ones."""

    rows: int = 0
    sessions: int = 0
    created: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    is_complete: bool = False

    def add(self, batch: "Batch", created: int) -> None:
        self.rows += batch.rows
        self.sessions += len(batch.summaries)
        self.created += created
        self.skipped += batch.skipped
        self.is_complete = batch.is_complete


# Told after every batch.
Progress = Callable[[Found], None]


@dataclass(slots=True)
class Batch:
    """Rows that are counted together. Nothing that was there is left up to `position`."""

    most_keys: int
    summaries: Summaries = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)
    rows: int = 0
    position: int = LEAST
    is_complete: bool = False
    ids: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, shape: Shape) -> "Batch":
        """Keys are kept only where a conversation's rows cannot be found by its id."""
        return cls(0 if shape.session is not None and shape.session.is_indexed and shape.key.is_serial else KEYS)

    def add(self, shape: Shape, rows: Sequence[asyncpg.Record]) -> None:
        said = [shape.said(row) for row in rows]
        fold((one for one in said if not isinstance(one, Skipped)), into=self.summaries, most_keys=self.most_keys)
        self.skipped.update(one.reason for one in said if isinstance(one, Skipped))
        self.rows += len(rows)


@dataclass(frozen=True, slots=True)
class Discovery:
    """Counts a table's new rows into the index. Several may do it at once: only one of them counts a row."""

    pool: Pool
    bounds: Bounds = Bounds()

    async def discover(self, source: str, foreign: Foreign, progress: Progress | None = None) -> Found:
        """One pass over a source, in bounded time; what it has not come to is for the next one."""
        until, found = monotonic() + self.bounds.seconds, Found()
        standing = await foreign.standing()
        with suppress(Outrun):
            await self._follow(source, foreign, standing)
        while not found.is_complete and monotonic() < until:
            try:
                batch, created = await self._tick(source, foreign, standing, until)
            except (Outrun, *CONFLICT):
                continue
            found.add(batch, created)
            if progress is not None:
                progress(found)
            if batch.rows == 0:
                break
        return found

    async def _follow(self, source: str, foreign: Foreign, standing: Standing) -> None:
        """A table that was emptied, or lost its last rows with a server, gives its ids out again."""
        state = await source_state.load(self.pool, source)
        gone = state.settled > LEAST and (standing.highest is None or standing.highest < state.settled)
        if not gone or (await foreign.look()).is_standby:  # another standby may only be late
            return
        settled = LEAST if standing.highest is None else standing.highest
        if standing.drawn is not None and standing.drawn >= state.settled:
            return  # the last rows were deleted, and their ids do not come again
        log.warning("source_shrunk", source=source, settled=state.settled, highest=standing.highest)
        async with self.pool.acquire() as connection, connection.transaction():
            new = replace(state, settled=settled, seen=Ranges(), marks=[])
            await source_state.swap(connection, source, new, rows=0, skipped={})

    async def _tick(self, source: str, foreign: Foreign, standing: Standing, until: float) -> tuple[Batch, int]:
        """Read one batch and count it. Raises Outrun."""
        state = await source_state.load(self.pool, source)
        look = await foreign.look()
        batch = await self._read(foreign, state, until)
        new = await self._moved(foreign, state, batch, look, standing)
        if new == state and not batch.rows:
            return batch, 0
        async with self.pool.acquire() as connection, connection.transaction():
            await source_state.swap(connection, source, new, rows=batch.rows, skipped=batch.skipped)
            return batch, await index.merge(connection, source, batch.summaries)

    async def _read(self, foreign: Foreign, state: State, until: float) -> Batch:
        batch, bounds = Batch.of(foreign.shape), self.bounds
        if len(state.seen) > _MOST_RANGES:
            log.warning("source_held", ranges=len(state.seen), settled=state.settled)
            gaps = state.seen.gaps(state.settled)[:-1]
        else:
            gaps = state.seen.gaps(state.settled)
        async with aclosing(foreign.pages(gaps)) as pages:
            async for page in pages:
                batch.add(foreign.shape, page.rows)
                batch.ids += [row[0] for row in page.rows]
                batch.position = page.position
                if is_end(page.position):
                    batch.is_complete = True
                elif len(batch.summaries) >= bounds.sessions or batch.rows >= bounds.rows or monotonic() > until:
                    break
        return batch

    async def _moved(self, foreign: Foreign, state: State, batch: Batch, look: Look, standing: Standing) -> State:
        """The state with a batch: `look` is from before it was read, so that whoever had gone by then is in it."""
        seen, settled = state.seen.with_numbers(batch.ids), state.settled
        highest, marks = settle(state.marks, look, grace_s=self.bounds.grace_of(look))
        if highest is not None:
            settled = max(settled, min(highest, batch.position))
        if standing.keeps:
            settled = max(state.settled, min(settled, _kept_open(seen, state.settled)))
        left = [mark for mark in marks if mark.hi > settled and (highest is None or mark.hi >= highest)]
        hi = seen.last(settled) if standing.drawn is None else min(seen.last(settled), standing.drawn)
        if hi > settled and (not left or hi > left[-1].hi):
            after = await foreign.look()
            left = marked(left, hi, after, grace_s=self.bounds.grace_of(after))
        return replace(state, settled=settled, seen=seen.above(settled), marks=left)


def _kept_open(seen: Ranges, after: int) -> int:
    """Up to where ids may be settled so that the newest gaps stay open. What is below the first id is none."""
    gaps = [gap for gap in seen.gaps(after)[:-1] if gap[0] > LEAST]
    return gaps[-min(_PATIENCE, len(gaps))][0] if gaps else seen.last(after)
