"""Who is next: gives a session's waiting messages their turn, one after the other, and takes orders about them."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from time import perf_counter
from uuid import UUID

import structlog

from app.chats.chat import Message
from app.errors import Conflict, Invalid, NotFound, Unavailable
from app.expiry import Expired
from app.flows import queue, sessions
from app.flows.beginning import Beginning, Prepared
from app.flows.queue import Turn
from app.flows.quotas import Quotas, estimate
from app.flows.run import CANCELLED, Failure, Run
from app.flows.runner import Runner
from app.postgres import Connection, Pool, retry_conflicts
from app.streams.bus import Bus
from app.streams.hub import Hub
from app.streams.replicas import Fenced, Replica
from app.streams.stream import Stream, Streams
from app.wall import Wall

log = structlog.get_logger(__name__)

# Sessions looked after in one pass.
_PER_PASS = 50


class Turns:
    """The end of a run gives the next message its turn; a pass does it where that replica could not."""

    def __init__(
        self,
        pool: Pool,
        replica: Replica,
        *,
        wall: Wall,
        hub: Hub,
        bus: Bus,
        streams: Streams,
        beginning: Beginning,
        runner: Runner,
        quotas: Quotas,
    ) -> None:
        self._quotas = quotas
        self._pool = pool
        self._replica = replica
        self._wall = wall
        self._hub = hub
        self._bus = bus
        self._streams = streams
        self._beginning = beginning
        self._runner = runner

    async def run_once(self) -> int:
        """Give turns that are due; returns how many."""
        given = 0
        if self._replica.refusal is None:
            for user_id, session_id in await queue.due(self._pool, _PER_PASS):
                given += await self.give(user_id, session_id)
        return given

    async def give_next(self, ended: Stream) -> None:
        """At the end of a run: whoever waits in its session is next."""
        await self.give(ended.user_id, ended.session_id)

    async def give(self, user_id: str, session_id: str) -> bool:
        """Start the first waiting message of a session, if there is one and the session is idle.

        Nothing happens where this replica is full or leaving: another one, or a later pass, gives the turn.
        """
        if self._replica.refusal is not None:
            return False
        try:
            run = await retry_conflicts(lambda: self._next(user_id, session_id))
            if run is None:
                return False
            self._hub.stir(run.stream.id)
            self._runner.start(run)
        except (Unavailable, Fenced, _Overtaken) as error:
            log.info("turn_postponed", reason=type(error).__name__)
            return False
        except Exception:  # around one session: the others have their turns, and the run that ended has ended well
            log.exception("turn_failed", session=session_id)
            return False
        self._streams.settle(run.stream.id)
        return True

    async def _next(self, user_id: str, session_id: str) -> Run | None:
        while first := await queue.first(self._pool, user_id=user_id, session_id=session_id):
            try:
                return await self._begin(first, user_id, session_id)
            except (NotFound, Invalid, Conflict) as error:
                # What it names has gone, its chatbot does not take it any more, or its id was used elsewhere.
                await self._refuse(first, Failure(error.code, error.detail))
        return None

    async def _begin(self, first: Turn, user_id: str, session_id: str) -> Run | None:
        # Its time counts from its turn: what it waited for was not the model.
        prepared = await self._beginning.prepare(replace(first.incoming, received=perf_counter()))
        self._runner.admit(prepared.flow)
        async with self._replica.transaction() as connection:
            if not await sessions.reoccupy(
                connection, user_id=user_id, session_id=session_id, stream_id=first.stream_id
            ):
                return None
            # Edited, removed or overtaken since it was read: the session stays as it was, and the next pass sees to it.
            if await queue.first(connection, user_id=user_id, session_id=session_id) != first:
                raise _Overtaken
            await queue.take(connection, first.stream_id)
            run = await self._beginning.write(
                connection, prepared, stream_id=first.stream_id, session_id=session_id, new=False, queued=True
            )
            # It was accepted, so it has its answer, whatever its history has become meanwhile.
            await self._hold(connection, run.stream.id, prepared, run.inputs.history, force=True)
            return run

    async def _refuse(self, first: Turn, failure: Failure) -> None:
        incoming = first.incoming
        assert incoming.session_id is not None
        async with self._replica.transaction() as connection:
            await sessions.lock(connection, user_id=incoming.user_id, session_id=incoming.session_id)
            await queue.take(connection, first.stream_id)
            error = {"code": failure.code, "message": failure.message, "error_id": None}
            await self._streams.end_queued(connection, first.stream_id, "failed", {"error": error})
        self._hub.stir(first.stream_id)

    # -- what its user may do with a waiting message

    async def edit(self, *, user_id: str, session_id: str, message_id: str, text: str) -> None:
        """What it holds of quotas follows its text. Raises NotFound for a message that does not wait any more, and
        TooMany where they have no room for this text.
        """
        names = {"user_id": user_id, "session_id": session_id, "message_id": message_id}
        prepared = await self._prepared(text, **names)
        async with self._replica.transaction(wall=self._wall) as connection:
            await sessions.lock(connection, user_id=user_id, session_id=session_id)
            stream_id = await queue.edit(connection, **names, text=text)
            if prepared is not None:
                history = await self._beginning.history(connection, prepared.incoming, session_id)
                await self._hold(connection, stream_id, prepared, history)

    async def _prepared(self, text: str, **names: str) -> Prepared | None:
        """A waiting message with another text, where it matters for quotas how long that is."""
        async with self._wall.connection() as connection:
            waiting = await queue.find(connection, **names)
            held = await self._streams.held(connection, waiting.stream_id)
        if held is None or not any(held.tokens):
            return None
        try:
            return await self._beginning.prepare(replace(waiting.incoming, text=text))
        except (NotFound, Invalid):
            return None  # its turn will tell

    async def _hold(
        self,
        connection: Connection,
        stream_id: UUID,
        prepared: Prepared,
        history: Sequence[Message],
        *,
        force: bool = False,
    ) -> None:
        """As many tokens as its answer may take, where it holds any. Last in its transaction, as in Intake."""
        held = await self._streams.held(connection, stream_id)
        if held is not None and any(held.tokens):
            held = await self._quotas.follow(connection, held, estimate(prepared, history), force=force)
            await self._streams.reserve(connection, stream_id, held)

    async def remove(self, *, user_id: str, session_id: str, message_id: str) -> UUID:
        """Its stream ends cancelled. Raises NotFound for a message that does not wait any more."""
        async with self._replica.transaction(wall=self._wall) as connection:
            await sessions.lock(connection, user_id=user_id, session_id=session_id)
            stream_id = await queue.remove(connection, user_id=user_id, session_id=session_id, message_id=message_id)
            await self._streams.end_queued(connection, stream_id, "cancelled", {})
        self._hub.stir(stream_id)
        return stream_id

    async def send_now(self, *, user_id: str, session_id: str, message_id: str) -> UUID:
        """To the front of the queue, and whatever is under way is stopped for it; its stream.

        Raises NotFound for a message that does not wait any more.
        """
        async with self._replica.transaction(wall=self._wall) as connection:
            running = await sessions.lock(connection, user_id=user_id, session_id=session_id)
            names = {"user_id": user_id, "session_id": session_id}
            stream_id = await queue.to_front(connection, **names, message_id=message_id)
            if running is not None:
                await self._streams.ask_to_stop(connection, running, owner=user_id)
        if running is not None:
            self._runner.stop(running, CANCELLED)
            self._bus.poke("stop")
        return stream_id


@dataclass(frozen=True, slots=True)
class Forgotten:
    """Messages that have waited for so long that nobody wants them answered any more: their streams end cancelled."""

    turns: Turns
    keep_s: float
    table: str = "queued_messages"

    async def expired(self, pool: Pool, most: int) -> Expired:
        return await queue.count_old(pool, self.keep_s, most)

    async def clean(self, pool: Pool, most: int) -> int:
        waiting = await queue.old(pool, self.keep_s, min(most, _PER_PASS))
        for user_id, session_id, message_id in waiting:
            with suppress(NotFound):  # its turn has come
                await self.turns.remove(user_id=user_id, session_id=session_id, message_id=message_id)
        return len(waiting)


class _Overtaken(Exception):
    """What was read of the queue is out of date."""
