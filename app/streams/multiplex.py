"""Several streams over one connection: their batches merged as they come, none starving another.

Bounded: each stream has its subscription and one batch on its way; all of them together have one that is handed over.
"""

import asyncio
from collections.abc import AsyncGenerator, Collection, Mapping
from contextlib import aclosing
from dataclasses import replace
from uuid import UUID

from app.streams.event import with_more_in_id
from app.streams.hub import Batch
from app.streams.tail import Tail

# What a stream hands over: a batch; what went wrong; None for its end, whatever the reason.
_Handed = Batch | Exception | None


def follow_all(
    tail: Tail, cursors: Mapping[UUID, int], max_age_s: float, *, ended: Collection[UUID] = ()
) -> AsyncGenerator[Batch, None]:
    """As `Tail.follow`, of one stream or of several. Streams in `ended` were read to their end.

    Of several, the id of each frame goes on with the other streams' cursors. So a reader that is cut anywhere, also
    between two frames, resumes all of them with the last id it saw.
    """
    if len(cursors) > 1:
        return _with_cursors(tail, cursors, max_age_s, ended)
    ((stream_id, cursor),) = cursors.items()
    return tail.follow(stream_id, cursor, max_age_s)


async def _with_cursors(
    tail: Tail, cursors: Mapping[UUID, int], max_age_s: float, ended: Collection[UUID]
) -> AsyncGenerator[Batch, None]:
    pairs = {stream_id: f",{stream_id}:{cursor}" if cursor else "" for stream_id, cursor in cursors.items()}
    going = {stream_id: cursor for stream_id, cursor in cursors.items() if stream_id not in ended}
    async with aclosing(_merged(tail, going, max_age_s)) as batches:
        async for batch in batches:
            others = "".join(pair for stream_id, pair in pairs.items() if stream_id != batch.stream_id)
            pairs[batch.stream_id] = f",{batch.stream_id}:{batch.last}"
            yield replace(batch, frames=with_more_in_id(batch.frames, others))


async def _merged(tail: Tail, cursors: Mapping[UUID, int], max_age_s: float) -> AsyncGenerator[Batch, None]:
    # A queue lets those who wait for room in it pass in the order in which they came: one batch of each, in turns.
    place: asyncio.Queue[_Handed] = asyncio.Queue(1)
    pumps = [asyncio.create_task(_pump(tail, *start, max_age_s, place)) for start in cursors.items()]
    try:
        going = len(pumps)
        while going:
            handed = await place.get()
            if isinstance(handed, Exception):
                raise handed
            if handed is None:
                going -= 1
            else:
                yield handed
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(tail: Tail, stream_id: UUID, cursor: int, max_age_s: float, place: asyncio.Queue[_Handed]) -> None:
    try:
        async with aclosing(tail.follow(stream_id, cursor, max_age_s)) as batches:
            async for batch in batches:
                await place.put(batch)
    except Exception as error:  # noqa: BLE001
        # Raised again where the reader is served.
        await place.put(error)
    else:
        await place.put(None)
