"""Reading a stream from any position: subscribe, catch up from the table, follow; each event once and in order."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from time import monotonic
from uuid import UUID

from app.errors import BadRequest, Gone, NotFound
from app.postgres import AWAY, Pool
from app.streams.event import Status
from app.streams.hub import Batch, Hub, Subscription, batch_of
from app.streams.log import Log

_STATE = """
select status, last_event_id,
       coalesce(last_event_id, (select max(id) from streaming_events where stream_id = $1), 0) as tail
from streaming_sessions where id = $1
"""
_EVENTS = "select id, payload from streaming_events where stream_id = $1 and id > $2 order by id limit $3"

# A page is bounded in bytes, too: a whole answer is at most PARLEY_ANSWER_LIMIT (1 MiB) of text.
_PAGE = 1000


@dataclass(frozen=True, slots=True)
class State:
    """A stream as its row and the log's end say: `tail` is the last id written so far, of an ended stream the last."""

    status: Status
    ended: bool
    tail: int


class Tail:
    """All reading of streams. Holds no connection while a reader waits."""

    def __init__(self, pool: Pool, hub: Hub, log: Log) -> None:
        self._pool = pool
        self._hub = hub
        self._log = log

    async def state(self, stream_id: UUID, cursor: int = 0) -> State:
        """Raises NotFound for an unknown stream, BadRequest for a cursor beyond its end."""
        state = await self._state(stream_id)
        if cursor > state.tail:
            raise BadRequest("cursor_beyond_end", f"The cursor {cursor} lies beyond the last event {state.tail}.")
        return state

    async def _state(self, stream_id: UUID) -> State:
        # A stream that is being written here needs no look into the database: the most frequent case, at its start.
        if (last_id := self._log.last_id(stream_id)) is not None:
            return State("active", False, last_id)
        row = await self._pool.fetchrow(_STATE, stream_id)
        if row is None:
            raise NotFound("stream_unknown", "There is no such stream; the id comes from POST /api/process-message.")
        return State(row["status"], row["last_event_id"] is not None, row["tail"])

    async def read(self, stream_id: UUID, cursor: int, limit: int) -> list[str]:
        """Payloads of the events cursor+1, cursor+2, … Raises Gone where the first of them were cleaned up."""
        rows = await self._pool.fetch(_EVENTS, stream_id, cursor, limit)
        if rows and rows[-1]["id"] != cursor + len(rows):
            raise _gone()
        return [row["payload"] for row in rows]

    async def read_known(self, stream_id: UUID, cursor: int, limit: int, state: State) -> list[str]:
        """As `read`, and raises Gone also where all events after the cursor were cleaned up."""
        payloads = await self.read(stream_id, cursor, limit)
        if not payloads and state.ended and cursor < state.tail:
            raise _gone()
        return payloads

    async def wait(self, stream_id: UUID, cursor: int, seconds: float) -> list[str]:
        """The next events as they come, or nothing after `seconds`: the long poll."""
        subscription = self._hub.subscribe(stream_id)
        try:
            async with asyncio.timeout(seconds):
                while not (payloads := await self.read(stream_id, cursor, _PAGE)) and not self._hub.closing:
                    await subscription.wait()
                return payloads
        except TimeoutError:
            return []
        finally:
            self._hub.unsubscribe(stream_id, subscription)

    async def follow(self, stream_id: UUID, cursor: int, max_age_s: float) -> AsyncGenerator[Batch, None]:
        """Batches from cursor+1 to the terminal event. Ends early at `max_age_s` or when the server closes.

        Raises Gone when the events are cleaned up under the reader. While the database is away it waits.
        """
        leave_at = monotonic() + max_age_s
        subscription = self._hub.subscribe(stream_id, cursor)
        try:
            while not self._hub.closing and monotonic() < leave_at:
                batch = subscription.take()
                if batch is None and subscription.behind:
                    batch = await self._catch_up(stream_id, cursor, subscription)
                if batch is None:
                    await subscription.wait()
                elif cursor + 1 == batch.first:
                    cursor = batch.last
                    yield batch
                    if batch.ended:
                        return
                elif cursor < batch.last:
                    # Not the next one, or one that the table gave in part: the table has it all.
                    subscription.fall_behind()
        finally:
            self._hub.unsubscribe(stream_id, subscription)

    async def _catch_up(self, stream_id: UUID, cursor: int, subscription: Subscription) -> Batch | None:
        # From here on pushes are kept, so nothing committed after the read is missed.
        subscription.behind = False
        try:
            payloads = await self.read(stream_id, cursor, _PAGE)
            if not payloads and not self._log.owns(stream_id):
                # Another replica's stream, or an old one: an end without its events means that they are gone.
                state = await self.state(stream_id)
                payloads = await self.read_known(stream_id, cursor, _PAGE, state)
                if state.ended and cursor == state.tail:
                    return Batch(cursor + 1, cursor, b"", ended=True)
        except AWAY:
            # Tried again when the hub looks around, not at once: all readers are in this together.
            subscription.behind = True
            return None
        subscription.has_read(cursor + len(payloads))
        if len(payloads) == _PAGE:
            subscription.fall_behind()
        return batch_of(stream_id, cursor + 1, payloads) if payloads else None


def _gone() -> Gone:
    return Gone("stream_cleaned", "The events of this stream were cleaned up; its messages are in the chat.")
