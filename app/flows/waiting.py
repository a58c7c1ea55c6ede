"""What may be done with a message that waits in its session's queue: another text, the next turn, or none at all."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from uuid import UUID

from app.chats.chat import Message
from app.errors import Invalid, NotFound
from app.expiry import Expired
from app.flows import queue, sessions
from app.flows.beginning import Beginning, Prepared
from app.flows.quotas import Quotas, estimate
from app.flows.run import CANCELLED
from app.flows.runner import Runner
from app.postgres import Connection, Pool
from app.streams.bus import Bus
from app.streams.hub import Hub
from app.streams.replicas import Replica
from app.streams.stream import Streams
from app.wall import Wall

# Messages that one statement of a clean-up takes.
_PER_PIECE = 50


class Waiting:
    """Its user's orders, and whoever speaks for the user: a stop, an erasure, a time that is over."""

    def __init__(
        self,
        replica: Replica,
        wall: Wall,
        *,
        hub: Hub,
        bus: Bus,
        streams: Streams,
        beginning: Beginning,
        runner: Runner,
        quotas: Quotas,
    ) -> None:
        self._replica = replica
        self._wall = wall
        self._hub = hub
        self._bus = bus
        self._streams = streams
        self._beginning = beginning
        self._runner = runner
        self._quotas = quotas

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
                await self.hold(connection, stream_id, prepared, history)

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

    async def hold(
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

    waiting: Waiting
    keep_s: float
    table: str = "queued_messages"

    async def expired(self, pool: Pool, most: int) -> Expired:
        return await queue.count_old(pool, self.keep_s, most)

    async def clean(self, pool: Pool, most: int) -> int:
        old = await queue.old(pool, self.keep_s, min(most, _PER_PIECE))
        for user_id, session_id, message_id in old:
            with suppress(NotFound):  # its turn has come
                await self.waiting.remove(user_id=user_id, session_id=session_id, message_id=message_id)
        return len(old)
