"""Reading a table whose keys a sequence gives out: what is above the settled watermark and not counted."""

from contextlib import aclosing
from dataclasses import replace
from time import monotonic

import structlog

from app.conversations.batch import Batch, Bounds
from app.conversations.foreign import Foreign, Standing, is_end
from app.conversations.ranges import LEAST, Ranges
from app.conversations.source_state import State
from app.conversations.watermark import marked, settle

log = structlog.get_logger(__name__)

# Gaps among the ids that are kept open where a session draws ids long before it uses them.
_PATIENCE = 1_000
# Ranges above the watermark, of 16 bytes each. With more of them only the gaps are read until whoever holds it ends.
_MOST_RANGES = 50_000


async def next_batch(
    foreign: Foreign, state: State, standing: Standing, *, bounds: Bounds, until: float
) -> tuple[Batch, State]:
    """The next rows, and the state with them."""
    state = await _followed(foreign, state, standing)
    look = await foreign.look()
    batch, ids, position = await _read(foreign, state, bounds, until)
    seen, settled = state.seen.with_numbers(ids), state.settled
    # Whoever had gone by the look before the rows were read has been read.
    highest, marks = settle(state.marks, look, grace_s=bounds.grace_of(look))
    if highest is not None:
        settled = max(settled, min(highest, position))
    if standing.keeps:
        settled = max(state.settled, min(settled, _kept_open(seen, state.settled, standing.first)))
    left = [mark for mark in marks if mark.hi > settled and (highest is None or mark.hi >= highest)]
    hi = _drawn(seen, settled, standing)
    if hi > settled and (not left or hi > left[-1].hi):
        after = await foreign.look()
        left = marked(left, hi, after, grace_s=bounds.grace_of(after))
    return batch, replace(state, settled=settled, seen=seen.above(settled), marks=left)


async def _followed(foreign: Foreign, state: State, standing: Standing) -> State:
    """A table that was emptied, or lost its last rows with its server, gives its ids out once more."""
    if not is_shrunk(state, standing):
        return state
    # What was known before the state was loaded may only be older than it, and so may be what a standby says.
    if not is_shrunk(state, standing := await foreign.standing()) or (await foreign.look()).is_standby:
        return state
    highest = standing.highest
    log.warning("source_shrunk", table=foreign.shape.table, settled=state.settled, highest=highest)
    return replace(state, settled=LEAST if highest is None else highest, seen=Ranges(), marks=[])


def is_shrunk(state: State, standing: Standing) -> bool:
    """Whether a table was emptied, or lost its last rows with its server, and gives ids out once more.

    Where only the last rows were deleted, their ids do not come again.
    """
    reached = state.settled
    if standing.drawn is not None:
        # Nothing is marked that was not drawn. Where that is not known, the last rows may just have been deleted.
        reached = max([reached, *(mark.hi for mark in state.marks)])
        if standing.drawn >= reached:
            return False
    return reached > LEAST and (standing.highest is None or standing.highest < reached)


async def _read(foreign: Foreign, state: State, bounds: Bounds, until: float) -> tuple[Batch, list[int], int]:
    """A batch, its ids, and up to where nothing is left that was there."""
    batch, ids, position = Batch.of(foreign.shape), list[int](), LEAST
    gaps = state.seen.gaps(state.settled)
    if len(gaps) > _MOST_RANGES:
        log.warning("source_held", table=foreign.shape.table, ranges=len(gaps), settled=state.settled)
        gaps.pop()
    async with aclosing(foreign.pages(gaps)) as pages:
        async for page in pages:
            batch.add(map(foreign.shape.said, page.rows))
            ids += [row[0] for row in page.rows]
            position = page.position
            batch.is_complete = is_end(position)
            if not batch.is_complete and (batch.is_full(bounds) or monotonic() > until):
                break
    return batch, ids, position


def _drawn(seen: Ranges, settled: int, standing: Standing) -> int:
    """Up to which id nobody who begins to write now draws one.

    Where nobody draws them here, as a program sets them, they are believed in the end: `seen` would grow for ever.
    """
    last = seen.last(settled)
    return last if standing.drawn is None or len(seen) > _MOST_RANGES else min(last, standing.drawn)


def _kept_open(seen: Ranges, after: int, first: int) -> int:
    """Up to where ids may be settled so that the newest gaps stay open. Below the `first` id there is none."""
    gaps = [gap for gap in seen.gaps(after)[:-1] if gap != (LEAST, first)]
    return gaps[-min(_PATIENCE, len(gaps))][0] if gaps else seen.last(after)
