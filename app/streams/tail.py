"""Reading a stream from any position: subscribe, catch up from the table, follow; each event once and in order."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Collection, Mapping
from dataclasses import dataclass
from time import monotonic
from uuid import UUID

import asyncpg

from app.errors import BadRequest, Gone, NotFound
from app.postgres import AWAY
from app.streams.event import Status
from app.streams.hub import Batch, Hub, Subscription, batch_of
from app.streams.log import Log
from app.wall import Wall

_STATES = """
select s.id, s.status, s.last_event_id, s.user_id,
       coalesce(s.last_event_id, (select max(e.id) from streaming_events e where e.stream_id = s.id), 0) as tail,
       s.last_event_id > u.i and not exists (
           select from streaming_events e where e.stream_id = u.s and e.id = u.i + 1) as cleaned
from unnest($1::uuid[], $2::bigint[]) as u(s, i)
join streaming_sessions s on s.id = u.s and ($3::text is null or s.user_id = $3)
"""
_EVENTS = "select id, payload from streaming_events where stream_id = $1 and id > $2 order by id limit $3"

# A page is bounded in bytes, too: a whole answer is at most PARLEY_ANSWER_LIMIT (1 MiB) of text.
_PAGE = 1000
# How long the database may take over one look into it, in seconds.
_ANSWER_S = 3


@dataclass(frozen=True, slots=True)
class State:
    """A stream as its row and the log's end say: `tail` is the last id written so far, of an ended stream the last.

    `user_id` is whose stream it is, None where that is not known without asking the database; `cleaned` whether what
    follows the reader's cursor is gone.
    """

    status: Status
    ended: bool
    tail: int
    user_id: str | None
    cleaned: bool = False

    def ended_at(self, cursor: int) -> bool:
        """Whether nothing comes after the cursor any more."""
        return self.ended and cursor == self.tail


class Tail:
    """All reading of streams. Holds no connection while a reader waits."""

    def __init__(self, wall: Wall, hub: Hub, log: Log, *, at_once: int = 4) -> None:
        self._wall = wall
        self._hub = hub
        self._log = log
        # Readers wait here for their turn, so that any number of them leaves connections to everybody else.
        self._turns = asyncio.Semaphore(at_once)
        # Whose a stream is that runs here; filled in by whoever runs them.
        self.user_of: Callable[[UUID], str | None] = lambda stream_id: None

    async def state(self, stream_id: UUID, cursor: int = 0, *, owner: str | None) -> State:
        """Of a stream of this user; with None, of anybody's.

        Raises NotFound for one that is unknown or another user's, BadRequest for a cursor beyond its end.
        """
        return (await self.states({stream_id: cursor}, owner=owner))[stream_id]

    async def states(self, cursors: Mapping[UUID, int], *, owner: str | None) -> dict[UUID, State]:
        """As `state`, of several streams. What it raises names the first of them."""
        # A stream that is being written here needs no look into the database: the most frequent case, at its start.
        here = ((stream_id, self._state_here(stream_id, cursor, owner)) for stream_id, cursor in cursors.items())
        states = {stream_id: state for stream_id, state in here if state is not None}
        if elsewhere := [stream_id for stream_id in cursors if stream_id not in states]:
            for row in await self._fetch(elsewhere, _STATES, elsewhere, [cursors[one] for one in elsewhere], owner):
                ended, cleaned = row["last_event_id"] is not None, bool(row["cleaned"])
                states[row["id"]] = State(row["status"], ended, row["tail"], row["user_id"], cleaned)
        for stream_id, cursor in cursors.items():
            if (state := states.get(stream_id)) is None:
                raise NotFound("stream_unknown", f"There is no stream {stream_id}; POST /api/process-message says ids.")
            if cursor > state.tail:
                beyond = f"The cursor {cursor} lies beyond the last event {state.tail} of {stream_id}."
                raise BadRequest("cursor_beyond_end", beyond)
        return states

    def _state_here(self, stream_id: UUID, cursor: int, owner: str | None) -> State | None:
        last_id = self._log.last_id(stream_id)
        # Whoever is further than this has read what our successor wrote: we are dead and do not know it yet.
        if last_id is None or cursor > last_id:
            return None
        state = State("active", False, last_id, self.user_of(stream_id))
        # One that is not known to be this user's is for the database to find, or not.
        return state if owner in (None, state.user_id) else None

    def require_kept(self, states: Mapping[UUID, State]) -> None:
        """Raises Gone naming the first of them of which the next event was cleaned up."""
        for stream_id, state in states.items():
            if state.cleaned:
                raise _gone(stream_id)

    async def _fetch(self, streams: Collection[UUID], statement: str, *values: object) -> list[asyncpg.Record]:
        async with self._turns, self._wall.connection(streams=streams, within_s=_ANSWER_S) as connection:
            return await connection.fetch(statement, *values)

    async def read(self, stream_id: UUID, cursor: int, limit: int) -> list[str]:
        """Payloads of the events cursor+1, cursor+2, … Raises Gone where the first of them were cleaned up."""
        rows = await self._fetch([stream_id], _EVENTS, stream_id, cursor, limit)
        if rows and rows[-1]["id"] != cursor + len(rows):
            raise _gone(stream_id)
        return [row["payload"] for row in rows]

    async def read_known(self, stream_id: UUID, cursor: int, limit: int, state: State) -> list[str]:
        """As `read`, and raises Gone also where all events after the cursor were cleaned up."""
        payloads = await self.read(stream_id, cursor, limit)
        if not payloads and state.ended and cursor < state.tail:
            raise _gone(stream_id)
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
                state = await self.state(stream_id, owner=None)
                payloads = await self.read_known(stream_id, cursor, _PAGE, state)
                if state.ended and cursor == state.tail:
                    return Batch(stream_id, cursor + 1, cursor, b"", ended=True)
        except AWAY:
            # Tried again when the hub looks around, not at once: all readers are in this together.
            subscription.behind = True
            return None
        subscription.has_read(cursor + len(payloads))
        if len(payloads) == _PAGE:
            subscription.fall_behind()
        return batch_of(stream_id, cursor + 1, payloads) if payloads else None


def _gone(stream_id: UUID) -> Gone:
    return Gone("stream_cleaned", f"The events of {stream_id} were cleaned up; its messages are in the chat.")
