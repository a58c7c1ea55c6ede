"""The tables `chats` and `messages`. Keys are per user, because ids may come from users' devices."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from app.chats.chat import Message, MessageStatus, title_from
from app.errors import Conflict
from app.postgres import Connection, Pool

# Behind every message of a chat.
_NO_POSITION = (1 << 31) - 1

# What belongs to a message besides its text: {"type": "image", "id"}, or {"type": "marker", "name", "content",
# "offset"}.
Attachment = Mapping[str, Any]

_SAVE_QUESTION = """
with chat as (
    insert into chats (user_id, id, title) values ($1, $2, $3)
    on conflict (user_id, id) do update set updated_at = now(), is_deleted = false)
insert into messages (user_id, chat_id, id, content, role, attachments, position)
values ($1, $2, $4, $5, 'user', $6,
        (select coalesce(max(position), 0) + 1 from messages where user_id = $1 and chat_id = $2))
on conflict (user_id, id) do nothing
returning position
"""
_SAVE_ANSWER = """
with chat as (
    update chats set updated_at = now() where user_id = $1 and id = $2)
insert into messages (user_id, chat_id, id, content, role, status, attachments, position)
values ($1, $2, $3, $4, 'assistant', $5, $6,
        (select coalesce(max(position), 0) + 1 from messages where user_id = $1 and chat_id = $2))
on conflict (user_id, id) do nothing
returning position
"""
_HAS_CHAT = "select exists (select from chats where user_id = $1 and id = $2)"
_QUESTION = "select content, position from messages where user_id = $1 and id = $2 and role = 'user' and not is_deleted"
_HISTORY = """
select role, content from messages
where user_id = $1 and chat_id = $2 and not is_deleted and status <> 'failed' and position < $4
order by position desc limit $3
"""


async def save_question(
    connection: Connection,
    *,
    user_id: str,
    chat_id: str,
    message_id: str,
    content: str,
    attachments: Sequence[Attachment] = (),
) -> int:
    """The user's message at the end of its chat, which is made where it is new; returns its position there.

    Raises Conflict for a used id.

    The caller holds the lock of the chat's session, so positions do not collide.
    """
    values = (user_id, chat_id, title_from(content), message_id, content, orjson.dumps(attachments).decode())
    position: int | None = await connection.fetchval(_SAVE_QUESTION, *values)
    if position is None:
        raise Conflict("message_exists", "A message with this client_message_id was stored before; choose a new id.")
    return position


async def save_answer(
    connection: Connection,
    *,
    user_id: str,
    chat_id: str,
    message_id: str,
    content: str,
    status: MessageStatus,
    attachments: Sequence[Attachment] = (),
) -> bool:
    """The assistant's message; saving it again under the same id changes nothing. Whether it is new."""
    kept = orjson.dumps(attachments).decode()
    position = await connection.fetchval(_SAVE_ANSWER, user_id, chat_id, message_id, content, status, kept)
    return position is not None


async def has_chat(connection: Connection, *, user_id: str, chat_id: str) -> bool:
    """Whether the user ever wrote in it."""
    known: bool = await connection.fetchval(_HAS_CHAT, user_id, chat_id)
    return known


@dataclass(frozen=True, slots=True)
class Question:
    """A user's message; `position` counts in its chat."""

    content: str
    position: int


async def question(connection: Connection | Pool, *, user_id: str, message_id: str) -> Question | None:
    """A user's message as it is stored; None where there is none, or none any more."""
    row = await connection.fetchrow(_QUESTION, user_id, message_id)
    return None if row is None else Question(**row)


async def history(
    connection: Connection | Pool, *, user_id: str, chat_id: str, limit: int, before: int | None = None
) -> list[Message]:
    """The last `limit` messages of a chat, or of what stands before a position of it, oldest first."""
    rows = await connection.fetch(_HISTORY, user_id, chat_id, limit, _NO_POSITION if before is None else before)
    return [Message(row["role"], row["content"]) for row in reversed(rows)]
