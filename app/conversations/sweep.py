"""Reading a table whose keys no sequence gives out: from its beginning to its end, again and again.

A sweep counts what has been written since the one before, by the transaction that wrote each row: one of those that
were under way then, or later. What of it was counted then all the same is told by the conversation's newest keys, and
so is a row that was only changed. Where an indexed time is at hand, only a sweep a day is of the whole table.
"""

from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, replace
from time import monotonic

import asyncpg
import structlog

from app.conversations.batch import Batch, Bounds
from app.conversations.foreign import Extent, Foreign, Standing
from app.conversations.source_state import Outrun, State
from app.conversations.sources.shape import Skipped
from app.conversations.summary import KEYS, Said
from app.postgres import Pool

log = structlog.get_logger(__name__)

# How much older than the sweep before a row's time may be, whatever zone it is in; the rest is for the day's sweep.
_OVERLAP_S = 36 * 3600
_DAY_S = 24 * 3600
# Transaction ids are compared within half of their circle.
_FAR = 2**31 - 10_000_000

_KNOWN = """
select username, conversation_id, message_ids, message_ranks from conversations
where source = $1 and (username, conversation_id) in (select * from unnest($2::text[], $3::text[]))
"""


@dataclass(frozen=True, slots=True)
class Sweep:
    """`since`: transactions that were over when the last sweep began have the ids below; 0 before there was one.

    `day` is that of the last whole sweep, `day_at` and `at` when those began, in seconds. While one is under way:
    `place` up to which it has come, `pages` of the table and its `file` when it began, and `next`, its own `since`.
    `is_in_doubt`: places have changed under it, so that nothing says any more what was counted but the keys.
    """

    since: int = 0
    at: float = 0
    day: int = 0
    day_at: float = 0
    place: str | None = None
    pages: int = 0
    file: int = 0
    next: int = 0
    next_at: float = 0
    is_whole: bool = True
    is_in_doubt: bool = False

    @property
    def after(self) -> int:
        """Rows of older transactions have been counted."""
        return self.day if self.is_whole else self.since


async def next_batch(
    pool: Pool, source: str, foreign: Foreign, state: State, standing: Standing, *, bounds: Bounds, until: float
) -> tuple[Batch, State]:
    """The next rows, and the state with them. Raises Outrun where the table was rewritten meanwhile."""
    sweep = await _under_way(foreign, Sweep(**state.sweep), standing)
    batch, extent = Batch.of(foreign.shape), _extent(sweep)
    place, keys = sweep.place, set[str]()
    async with aclosing(foreign.swept(extent)) as pages:
        async for page in pages:
            batch.add(await _uncounted(pool, source, foreign, sweep, page.rows, keys))
            place = page.place
            if batch.is_full(bounds) or monotonic() > until:
                break
        else:
            batch.is_complete = True
    if (await foreign.standing()).file != sweep.file:
        # Rows may have gone to places that were read before.
        raise Outrun
    swept = _ended(sweep) if batch.is_complete else replace(sweep, place=place if sweep.is_whole else None)
    return batch, replace(state, sweep=asdict(swept))


async def _under_way(foreign: Foreign, sweep: Sweep, standing: Standing) -> Sweep:
    if sweep.place is not None and sweep.file == standing.file:
        return sweep
    look = await foreign.look()
    # Pages that were counted before the look are too few for what it takes for read.
    standing = await foreign.standing()
    if sweep.place is not None:
        log.warning("sweep_begun_again", table=foreign.shape.table)
        return replace(sweep, place="(0,0)", pages=standing.pages, file=standing.file, is_in_doubt=True)
    # A whole day's rows are looked through again, so one is due only where there is a quicker way for the others.
    is_whole = not (standing.is_by_time and sweep.day) or look.at - sweep.day_at > _DAY_S
    begun = replace(sweep, next=look.oldest, next_at=look.at, is_whole=is_whole)
    if is_whole and not standing.is_by_time:
        begun = replace(begun, day=sweep.since)
    is_in_doubt = begun.after > 0 and look.next - begun.after > _FAR
    return replace(begun, place="(0,0)", pages=standing.pages, file=standing.file, is_in_doubt=is_in_doubt)


def _extent(sweep: Sweep) -> Extent:
    since = None if sweep.is_in_doubt or sweep.after == 0 else sweep.after
    earliest = None if sweep.is_whole else sweep.at - _OVERLAP_S
    return Extent(sweep.place or "(0,0)", sweep.pages, since, sweep.next, earliest)


def _ended(sweep: Sweep) -> Sweep:
    ended = replace(sweep, since=sweep.next, at=sweep.next_at, place=None, is_in_doubt=False)
    return replace(ended, day=sweep.next, day_at=sweep.next_at) if sweep.is_whole else ended


async def _uncounted(
    pool: Pool, source: str, foreign: Foreign, sweep: Sweep, rows: Sequence[asyncpg.Record], keys: set[str]
) -> list[Said | Skipped]:
    """Those of the rows that nobody has counted. Of a first sweep, only newer ones may be.

    `keys` are those of this batch: a row that is changed between two pieces of the table may be in both.
    """
    read = [(foreign.shape.said(row), row["parley_is_new"]) for row in rows]
    is_first = sweep.after == 0 and not sweep.is_in_doubt
    doubtful = [said for said, is_new in read if isinstance(said, Said) and (is_new or not is_first)]
    known = await known_keys(pool, source, doubtful) if doubtful else {}
    counted: list[Said | Skipped] = []
    for said, is_new in read:
        if isinstance(said, Skipped):
            # A row that says nothing is no part of a conversation, so it is told of once: when it is first seen.
            if is_first or is_new:
                counted.append(said)
        elif said.key not in keys and (
            (is_first and not is_new) or not is_known(known.get((said.username, said.conversation_id)), said)
        ):
            keys.add(said.key)
            counted.append(said)
    return counted


Keys = tuple[frozenset[str], tuple[int, str] | None]


async def known_keys(pool: Pool, source: str, rows: Sequence[Said]) -> Mapping[tuple[str, str], Keys]:
    """The newest keys of these rows' conversations, and the oldest of them where there were more.

    Whoever swaps the state that the rows were read with has read what it says here, too.
    """
    names = {(said.username, said.conversation_id) for said in rows}
    found = await pool.fetch(_KNOWN, source, [name[0] for name in names], [name[1] for name in names])
    return {
        (row["username"], row["conversation_id"]): (
            frozenset(row["message_ids"]),
            (row["message_ranks"][0], row["message_ids"][0]) if len(row["message_ids"]) >= KEYS else None,
        )
        for row in found
    }


def is_known(keys: Keys | None, said: Said) -> bool:
    """A row older than the keys that were kept is a changed one, as far as anybody can tell."""
    if keys is None:
        return False
    kept, oldest = keys
    return said.key in kept or (oldest is not None and (said.rank, said.key) < oldest)
