"""Messages saved as runs save them, by several at once, with pauses wherever a transaction can be overtaken."""

import asyncio
from datetime import UTC, datetime
from random import Random
from uuid import UUID, uuid4

import asyncpg

from app.chats import store, usage
from app.conversations import index
from app.conversations.index import Chat, Share

# Of a replica that lives, where there is one: nobody shall take it over.
_BEGIN = """
insert into streaming_sessions (id, user_id, session_id, chatbot_id, chatbot_version, flow_type, status, replica_id)
values ($1, $2, $3, $4, 1, 'main', 'active', (select id from replicas where alive limit 1))
"""
_END = "update streaming_sessions set status = 'completed', ended_at = now() where id = $1"
# Accepts of a chat wait for each other, so that positions do not collide.
_SESSION = "select pg_advisory_xact_lock(hashtext($1))"


class Saver:
    """Saves whole runs: a question, the answer with what it has cost, the end with what all has cost."""

    def __init__(self, connection: asyncpg.Connection, chance: Random) -> None:
        self._connection = connection
        self._chance = chance

    async def save(self, chat: Chat, *, ends: bool = True) -> UUID:
        stream, chance = uuid4(), self._chance
        async with self._connection.transaction():
            await self._connection.execute(_SESSION, chat.id)
            await self._connection.execute(_BEGIN, stream, chat.user_id, chat.id, chat.chatbot_id)
            await store.save_question(
                self._connection,
                user_id=chat.user_id,
                chat_id=chat.id,
                message_id=uuid4().hex,
                content=stream.hex,
                along=[index.asked(chat, stream.hex, client_ip="203.0.113.7")],
            )
            await self._pause()
        async with self._connection.transaction():
            await self._connection.execute(_SESSION, chat.id)
            await store.save_answer(
                self._connection,
                user_id=chat.user_id,
                chat_id=chat.id,
                message_id=uuid4().hex,
                content="Yes.",
                status="complete",
            )
            await self._pause()
            await index.answered(self._connection, chat, model="small")
            await usage.record(self._connection, [_entry(stream, chat, "main", chance.randrange(100))])
        await self._pause()
        if ends:
            await self.end(stream, chat)
        return stream

    async def end(self, stream: UUID, chat: Chat) -> None:
        async with self._connection.transaction():
            await usage.record(self._connection, [_entry(stream, chat, "side", self._chance.randrange(100))])
            await self._pause()
            tokens = await self._connection.fetchval(
                "select sum(prompt_tokens + completion_tokens) from usage_ledger where stream_id = $1", stream
            )
            await index.ended(self._connection, chat, {"small": Share(2, 1, tokens, 5)})
            await self._pause()
            await self._connection.execute(_END, stream)

    async def _pause(self) -> None:
        for _ in range(self._chance.randrange(6)):
            await asyncio.sleep(0)


def _entry(stream: UUID, chat: Chat, flow: str, tokens: int) -> usage.Entry:
    return usage.Entry(
        stream_id=stream,
        flow=flow,
        attempt=1,
        user_id=chat.user_id,
        chatbot_id=chat.chatbot_id,
        provider="demo",
        model="small",
        outcome="completed",
        error_code=None,
        prompt_tokens=tokens,
        completion_tokens=1,
        first_token_ms=1,
        duration_ms=5,
        started_at=datetime.now(UTC),
        chat_id=chat.id,
    )
