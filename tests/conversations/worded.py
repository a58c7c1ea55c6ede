"""The words of messages beside what would be written of them."""

import asyncpg

from app.conversations.message_words import MOST, MessageWords
from app.conversations.words import tokens
from app.postgres import open_pool

# Messages that are shown with other words than theirs, or with none, and words of none that is.
_DIFFERING = f"""
select m.user_id, m.chat_id, m.id, w.username, w.message_id from (
    select m.user_id, m.chat_id, m.id, {tokens(f"left(m.content, {MOST})")} as words
    from messages m join chats c on c.user_id = m.user_id and c.id = m.chat_id
    where not m.is_deleted and m.status <> 'failed' and not c.is_deleted) m
full join message_words w on (w.username, w.conversation_id, w.message_id) = (m.user_id, m.chat_id, m.id)
where w.words is distinct from m.words
"""


async def differing(database: asyncpg.Connection) -> list[tuple[str, ...]]:
    return [tuple(row) for row in await database.fetch(_DIFFERING)]


async def follow(dsn: str, *, is_on: bool = True, pass_s: float = 20.0) -> int:
    """A pass of the job."""
    pool = await open_pool(dsn, 2)
    try:
        return await MessageWords(pool, is_on, pass_s=pass_s).run_once()
    finally:
        pool.terminate()
