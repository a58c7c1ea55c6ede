"""What chats were called before another word won, and how one of those comes back."""

from collections.abc import Sequence

import asyncpg

from app.errors import NotFound
from app.postgres import Connection
from app.sync.changes import Changes
from app.sync.chats import unknown
from app.sync.edits import later
from app.sync.merge import Chat, Op, PutChat
from app.sync.rows import CHAT

# Also of a deleted chat, which comes back with it; nothing is left of a purged one.
_CHAT = f"select {CHAT} from chats where user_id = $1 and id = $2 and not is_purged"
_VERSIONS = """
select stamp, client, title, parent_chat_id, branch_from_message_id, created_at from chat_versions
where user_id = $1 and chat_id = $2 order by stamp desc, client desc
"""
_VERSION = """
select title, parent_chat_id, branch_from_message_id from chat_versions
where user_id = $1 and chat_id = $2 and stamp = $3 and client = $4
"""


async def versions(connection: Connection, user_id: str, chat_id: str) -> Sequence[asyncpg.Record]:
    """The latest word first; app/sync/rows.py bounds how many are kept. Raises NotFound."""
    await _require(connection, user_id, chat_id)
    return await connection.fetch(_VERSIONS, user_id, chat_id)


async def restore(changes: Changes, user_id: str, chat_id: str, stamp: str, client: str) -> str:
    """A new word on the chat, saying what that one said; its title. What it replaces is kept. Raises NotFound."""
    title = ""

    async def ops(connection: Connection, now_ms: int) -> Sequence[Op]:
        nonlocal title
        chat = await _require(connection, user_id, chat_id)
        kept = await connection.fetchrow(_VERSION, user_id, chat_id, stamp, client)
        if kept is None:
            raise NotFound("version_unknown", "The chat has no such version; GET /api/chats/ID/versions lists them.")
        title, *branch = kept
        is_so = not chat.is_deleted and [chat.title, chat.parent_chat_id, chat.branch_from_message_id] == [*kept]
        return [] if is_so else [PutChat(chat.id, title, later(chat, now_ms), *branch)]

    await changes.write(user_id, ops)
    return title


async def _require(connection: Connection, user_id: str, chat_id: str) -> Chat:
    row = await connection.fetchrow(_CHAT, user_id, chat_id)
    if row is None:
        raise unknown()
    return Chat(*row)
