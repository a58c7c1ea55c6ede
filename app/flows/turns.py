"""Who is next: gives a session's waiting messages their turn, one after the other."""

from dataclasses import replace
from time import perf_counter

import structlog

from app.errors import Conflict, Invalid, NotFound, Unavailable
from app.flows import queue, sessions
from app.flows.beginning import Beginning
from app.flows.queue import Turn
from app.flows.run import Failure, Run
from app.flows.runner import Runner
from app.flows.waiting import Waiting
from app.postgres import Pool, retry_conflicts
from app.streams.hub import Hub
from app.streams.replicas import Fenced, Replica
from app.streams.stream import Stream, Streams

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
        hub: Hub,
        streams: Streams,
        beginning: Beginning,
        runner: Runner,
        waiting: Waiting,
    ) -> None:
        self._pool = pool
        self._replica = replica
        self._hub = hub
        self._streams = streams
        self._beginning = beginning
        self._runner = runner
        self._waiting = waiting

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
            await self._waiting.hold(connection, run.stream.id, prepared, run.inputs.history, force=True)
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


class _Overtaken(Exception):
    """What was read of the queue is out of date."""
