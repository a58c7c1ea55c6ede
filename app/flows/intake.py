"""Accepting a message: everything that must not be lost is committed in one transaction before the client is told."""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any, Literal

from app.chats import store
from app.chats.chat import Message, most_recent
from app.errors import Unavailable
from app.flows import idempotency, sessions
from app.flows.chatbots import Chatbots
from app.flows.plan import Ask, Plan, plan
from app.flows.run import Inputs, Run
from app.flows.runner import Runner
from app.flows.wishes import allowed
from app.postgres import Connection, retry_conflicts
from app.streams.replicas import Fenced, Replica
from app.streams.stream import Stream, Streams


@dataclass(frozen=True, slots=True)
class Incoming:
    """A validated message. `history` of None means: what is stored."""

    user_id: str
    chatbot_id: str
    text: str
    session_id: str | None = None
    message_id: str | None = None
    history: Sequence[Message] | None = None
    configuration: dict[str, Any] = field(default_factory=dict)
    key: idempotency.Key | None = None
    request_id: str | None = None
    received: float = field(default_factory=perf_counter)


@dataclass(frozen=True, slots=True)
class Accepted:
    """What the client is told, the first time and every time it repeats the request."""

    session_id: str
    streaming_session_id: str
    flow_type: str
    status: Literal["active"]
    replayed: bool = False


@dataclass(frozen=True, slots=True)
class Memory:
    """How much of a chat the model sees, and for how long an idempotency key is remembered."""

    messages: int = 200
    bytes: int = 256 << 10
    key_s: float = 86400


# How long an accept waits for its turn in a burst, in seconds.
_TURN_S = 5


class Intake:
    """The accepting transaction. Its locks, in order: idempotency key, session, chat, message, stream, fence.

    At most `at_once` of them are under way, so that a burst of messages leaves connections to readers and health.
    """

    def __init__(
        self,
        replica: Replica,
        streams: Streams,
        *,
        chatbots: Chatbots,
        runner: Runner,
        memory: Memory,
        at_once: int,
    ) -> None:
        self._turns = asyncio.Semaphore(at_once)
        self._replica = replica
        self._streams = streams
        self._chatbots = chatbots
        self._runner = runner
        self._memory = memory

    async def accept(self, incoming: Incoming) -> Accepted:
        """Make the message durable, start its run, and say where the answer streams.

        Raises NotFound, Conflict, Invalid or Unavailable; then nothing was written.
        """
        if self._replica.refusal is not None:
            raise self._replica.refusal
        try:
            async with self._turn():
                return await retry_conflicts(lambda: self._accept(incoming))
        except Fenced:
            raise Unavailable("replica_lost", "The server is recovering; send it again.", retry_after=2) from None

    @asynccontextmanager
    async def _turn(self) -> AsyncGenerator[None, None]:
        """Wait for a place. Nobody waits for a database that is known to be away: those inside find out for all."""
        if not self._replica.beating:
            raise Unavailable("database_unavailable", "The database is away.", retry_after=2)
        try:
            async with asyncio.timeout(_TURN_S):
                await self._turns.acquire()
        except TimeoutError:
            raise Unavailable("overloaded", "Too many messages at once; try again soon.", retry_after=2) from None
        try:
            yield
        finally:
            self._turns.release()

    async def _accept(self, incoming: Incoming) -> Accepted:
        version, chatbot = await self._chatbots.newest(incoming.chatbot_id)
        wishes = allowed(incoming.configuration, chatbot)
        ask = Ask(incoming.text, False, wishes.language, wishes.flow_type)
        planned = plan(chatbot, ask)
        async with self._replica.transaction() as connection:
            if incoming.key and (told := await self._replay(connection, incoming.key)):
                return told
            # Only now: a repetition is answered even when there is no room for another run.
            self._runner.admit()
            stream, history = await self._write(connection, incoming, version, planned)
            accepted = Accepted(stream.session_id, str(stream.id), stream.flow_type, "active")
            if incoming.key:
                await idempotency.remember(connection, incoming.key, asdict(accepted))
        inputs = Inputs(
            incoming.text,
            history,
            language=wishes.language,
            values={**chatbot.values, **wishes.values},
            temperature=wishes.temperature,
            top_k=wishes.top_k,
        )
        self._runner.start(Run(stream, chatbot, planned, inputs, incoming.request_id, incoming.received))
        self._streams.settle(stream.id)
        return accepted

    async def _replay(self, connection: Connection, key: idempotency.Key) -> Accepted | None:
        told = await idempotency.claim(connection, key, remember_s=self._memory.key_s)
        return Accepted(**{**told, "replayed": True}) if told else None

    async def _write(
        self, connection: Connection, incoming: Incoming, version: int, planned: Plan
    ) -> tuple[Stream, Sequence[Message]]:
        user_id, session_id = incoming.user_id, incoming.session_id or str(uuid.uuid4())
        stream_id, new = await sessions.occupy(
            connection, user_id=user_id, session_id=session_id, chatbot_id=incoming.chatbot_id
        )
        history = incoming.history
        if history is None:
            history = () if new else await self._stored(connection, user_id, session_id)
        await store.save_question(
            connection,
            user_id=user_id,
            chat_id=session_id,
            message_id=incoming.message_id or str(uuid.uuid4()),
            content=incoming.text,
        )
        stream = Stream(stream_id, user_id, session_id, incoming.chatbot_id, version, planned.decision.flow)
        await self._streams.begin(connection, stream, _start(stream, planned))
        return stream, history

    async def _stored(self, connection: Connection, user_id: str, chat_id: str) -> list[Message]:
        stored = await store.history(connection, user_id=user_id, chat_id=chat_id, limit=self._memory.messages)
        return most_recent(stored, limit=self._memory.messages, max_bytes=self._memory.bytes)


def _start(stream: Stream, planned: Plan) -> dict[str, Any]:
    return {
        "session_id": stream.session_id,
        "chatbot_id": stream.chatbot_id,
        "flow_type": stream.flow_type,
        "plan": planned.shown(),
    }
