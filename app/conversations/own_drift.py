"""What the index says of our own chats beside what their messages say, a piece at a time.

Each batch is compared as one snapshot shows it, without a lock: a message and what the index says of it are saved in
one transaction, so what differs there is wrong. Only that is locked, and counted anew.
"""

from time import monotonic

import structlog

from app.conversations.recount import Key, Recounted, chats_after, count_most, differing, orphans_after
from app.conversations.rounds import Piece, Place
from app.postgres import Connection, Pool

log = structlog.get_logger(__name__)

# Chats that one statement compares.
_BATCH = 200


async def own_piece(pool: Pool, place: Place, *, until: float) -> Piece:
    """From a place on, to the end of the round or `until`, in monotonic time; a batch of each walk at least."""
    after: Key | None = tuple(place["after"]) if place.get("after") else None
    walk, done, compared = place.get("walk", "chats"), Recounted(), 0
    while True:
        async with pool.acquire() as connection:
            if walk == "chats":
                keys = await chats_after(connection, after, _BATCH)
                after, compared = keys[-1] if keys else None, compared + len(keys)
                await _put_right(connection, await differing(connection, keys) if keys else [], done)
            else:
                gone, after = await orphans_after(connection, after or ("", ""))
                await _put_right(connection, gone, done)
        if after is None:
            if walk == "orphans":
                return Piece(None, compared, done.written, done.failures)
            walk = "orphans"
        if monotonic() > until:
            return Piece({"walk": walk, "after": after}, compared, done.written, done.failures)


async def _put_right(connection: Connection, keys: list[Key], done: Recounted) -> None:
    if keys:
        await count_most(connection, keys, done)
