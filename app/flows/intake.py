"""Accepting a message: everything that must not be lost is committed in one transaction before the client is told."""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import structlog

from app.chats.chat import Message
from app.errors import Conflict, Invalid, NotFound, TooMany, Unavailable
from app.flows import idempotency, queue, sessions
from app.flows.beginning import Beginning, Prepared
from app.flows.config import Chatbot
from app.flows.incoming import Incoming
from app.flows.quotas import Quota, Quotas, estimate
from app.flows.run import CANCELLED, Run
from app.flows.runner import Runner
from app.postgres import Connection, Pool, prompt_connection, retry_conflicts
from app.streams.bus import Bus
from app.streams.replicas import Fenced, Replica
from app.streams.stream import Stream, Streams

log = structlog.get_logger(__name__)

# How long an accept waits for its turn in a burst, in seconds.
_TURN_S = 5


@dataclass(frozen=True, slots=True)
class Accepted:
    """What the client is told, the first time and every time it repeats the request."""

    session_id: str
    streaming_session_id: str
    flow_type: str
    status: Literal["active", "queued"]
    replayed: bool = False


class Intake:
    """The accepting transaction. Its locks, in order: idempotency key, session, sync head (of the user), chat, message,
    stream, quotas, fence.

    At most `at_once` of them are under way, so that a burst of messages leaves connections to everybody else.
    `key_s`: how long an idempotency key is remembered; `user_runs`: the most answers of a user under way, on all
    replicas together; `room`: the most messages that wait. Nobody in particular (no user) is not counted.
    """

    def __init__(
        self,
        pool: Pool,
        replica: Replica,
        streams: Streams,
        *,
        bus: Bus,
        beginning: Beginning,
        runner: Runner,
        key_s: float,
        user_runs: int,
        room: queue.Room,
        quotas: Quotas,
        at_once: int,
    ) -> None:
        self._quotas = quotas
        self._turns = asyncio.Semaphore(at_once)
        self._at_once = at_once
        self._pool = pool
        self._replica = replica
        self._streams = streams
        self._bus = bus
        self._beginning = beginning
        self._runner = runner
        self._key_s = key_s
        self._user_runs = user_runs
        self._room = room

    async def accept(self, incoming: Incoming) -> Accepted:
        """Make the message durable, start its run or queue it, and say where the answer streams.

        Raises NotFound, Conflict, Invalid, TooMany or Unavailable; then nothing was written.
        """
        self._replica.admit()
        if incoming.image_data is not None:
            # Its picture is stored before the transaction begins, so it is refused before that.
            if told := await self._recall(incoming):
                return told
            await self.admit(incoming)
        try:
            prepared = await retry_conflicts(lambda: self._beginning.prepare(incoming))
        except (NotFound, Invalid):
            # A repetition is told what the first one was, whatever has changed since (G11).
            if told := await self._recall(incoming):
                return told
            raise
        try:
            async with self._turn():
                return await retry_conflicts(lambda: self._accept(prepared))
        except Fenced:
            raise Unavailable("replica_lost", "The server is recovering; send it again.", retry_after=2) from None

    async def admit(self, incoming: Incoming) -> None:
        """Raises TooMany where a message would be refused, as far as that can be known before it is accepted."""
        try:
            quotas = self._quotas_of(incoming, await self._beginning.chatbot(incoming.chatbot_id))
        except NotFound:  # it is told that soon
            quotas = []
        async with prompt_connection(self._pool) as connection:
            await self._require_place(connection, incoming.user_id, incoming.session_id)
            await self._quotas.require(connection, quotas)

    def _quotas_of(self, incoming: Incoming, chatbot: Chatbot) -> list[Quota]:
        return self._quotas.of(incoming.user_id, chatbot, chatbot_id=incoming.chatbot_id, principal=incoming.principal)

    async def _require_place(self, connection: Connection, user_id: str, session_id: str | None) -> None:
        if not user_id:
            return
        if await sessions.active_elsewhere(connection, user_id=user_id, session_id=session_id) >= self._user_runs:
            detail = f"{self._user_runs} answers of this user are under way; let one of them end."
            raise TooMany("too_many_runs", detail, retry_after=5)

    async def _recall(self, incoming: Incoming) -> Accepted | None:
        """What this request was told before, as far as that can be known before it is accepted."""
        if incoming.key is None:
            return None
        async with prompt_connection(self._pool) as connection:
            told = await idempotency.recall(connection, incoming.key, remember_s=self._key_s)
        return _replayed(told)

    async def close(self, within_s: float) -> None:
        """Wait until no accept is under way, after the replica has begun to refuse them; none follows."""
        try:
            async with asyncio.timeout(within_s):
                for _ in range(self._at_once):
                    await self._turns.acquire()
        except TimeoutError:
            log.warning("accepts_unfinished")

    @asynccontextmanager
    async def _turn(self) -> AsyncGenerator[None, None]:
        """Wait for a place."""
        try:
            async with asyncio.timeout(_TURN_S):
                await self._turns.acquire()
        except TimeoutError:
            raise Unavailable("overloaded", "Too many messages at once; try again soon.", retry_after=2) from None
        try:
            yield
        finally:
            self._turns.release()

    async def _accept(self, prepared: Prepared) -> Accepted:
        incoming = prepared.incoming
        async with self._replica.transaction() as connection:
            if incoming.key and (told := await self._replay(connection, incoming.key)):
                return told
            # Only now: a repetition is answered even when there is no room for another run.
            self._runner.admit(prepared.flow)
            place = await self._place(connection, prepared)
            stream = place.stream
            status: Literal["active", "queued"] = "active" if isinstance(place, Run) else "queued"
            accepted = Accepted(stream.session_id, str(stream.id), stream.flow_type, status)
            if incoming.key:
                await idempotency.remember(connection, incoming.key, asdict(accepted))
            if quotas := self._quotas_of(incoming, prepared.chatbot):
                await self._reserve(connection, place, prepared, quotas)
        if isinstance(place, Run):
            self._runner.start(place)
            self._streams.settle(stream.id)
        elif place.interrupts is not None:
            self._runner.stop(place.interrupts, CANCELLED)
            self._bus.poke("stop")
        return accepted

    async def _reserve(
        self, connection: Connection, place: "Run | _Queued", prepared: Prepared, quotas: Sequence[Quota]
    ) -> None:
        """Last of all, as many may wait for the row of one chatbot or key. Raises TooMany; nothing is written then."""
        stream_id, tokens = place.stream.id, 0
        if any(quota.daily.tokens is not None for quota in quotas):
            tokens = estimate(prepared, await self._history(connection, place, prepared.incoming))
        try:
            reservation = await self._quotas.reserve(connection, quotas, tokens)
        except TooMany:
            self._streams.settle(stream_id)  # it never was
            raise
        await self._streams.reserve(connection, stream_id, reservation)

    async def _history(self, connection: Connection, place: "Run | _Queued", incoming: Incoming) -> Sequence[Message]:
        """Of a message that waits, as it is by now: what it holds follows when its turn comes."""
        if isinstance(place, Run):
            return place.inputs.history
        return await self._beginning.history(connection, incoming, place.stream.session_id)

    async def _replay(self, connection: Connection, key: idempotency.Key) -> Accepted | None:
        return _replayed(await idempotency.claim(connection, key, remember_s=self._key_s))

    async def _place(self, connection: Connection, prepared: Prepared) -> "Run | _Queued":
        """Occupy the session, or find a place in its queue."""
        incoming = prepared.incoming
        session_id = incoming.session_id or str(uuid.uuid4())
        occupied = await sessions.occupy(
            connection, user_id=incoming.user_id, session_id=session_id, chatbot_id=incoming.chatbot_id
        )
        if occupied is None:
            return await self._enqueue(connection, prepared, session_id)
        if occupied.others is None or occupied.others >= self._user_runs:
            await self._require_place(connection, incoming.user_id, session_id)
        # Not whether the session's row is new: that of an old chat is made anew after it was forgotten.
        new = incoming.session_id is None
        return await self._beginning.write(
            connection,
            prepared,
            stream_id=occupied.stream_id,
            session_id=session_id,
            new=new,
            queued=False,
            seq=occupied.seq,
        )

    async def _enqueue(self, connection: Connection, prepared: Prepared, session_id: str) -> "_Queued":
        incoming = prepared.incoming
        on_busy = incoming.on_busy or prepared.chatbot.on_busy
        if on_busy == "reject":
            raise Conflict(
                "session_busy", "An answer is under way in this session; wait for its stream_end, then send again."
            )
        await sessions.one_at_a_time(connection, user_id=incoming.user_id)
        interrupts = None
        first = on_busy == "interrupt"
        fields = (incoming.user_id, session_id, incoming.chatbot_id, prepared.version, prepared.flow_type)
        stream = await self._streams.enqueue(connection, *fields)
        await queue.add(connection, incoming, session_id=session_id, stream_id=stream.id, room=self._room, first=first)
        if first:
            interrupts = await sessions.lock(connection, user_id=incoming.user_id, session_id=session_id)
            if interrupts is not None:
                await self._streams.ask_to_stop(connection, interrupts, owner=incoming.user_id)
        return _Queued(stream, interrupts)


def _replayed(told: dict[str, Any] | None) -> Accepted | None:
    return Accepted(**{**told, "replayed": True}) if told else None


@dataclass(frozen=True, slots=True)
class _Queued:
    """A message that waits; `interrupts` is the stream that is stopped for it."""

    stream: Stream
    interrupts: uuid.UUID | None
