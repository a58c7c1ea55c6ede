"""The tables `chats` and `messages`. Keys are per user, because ids may come from users' devices."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import orjson

from app.chats.chat import Message, MessageStatus, title_from
from app.chats.head import advance
from app.errors import Conflict
from app.postgres import Connection, Pool
from app.statement import Part, fetch_together

# Behind every message of a chat.
_NO_POSITION = (1 << 31) - 1

# What belongs to a message besides its text: {"type": "image", "id"}, or {"type": "marker", "name", "content",
# "offset"}.
Attachment = Mapping[str, Any]

# Where a message goes, and its stamp (app/sync/merge.py): behind those of the last message there.
_NEXT = """
last as (
    select position, ('x' || left(stamp, 12))::bit(48)::bigint as ms from messages
    where user_id = $1 and chat_id = $2 order by position desc limit 1),
next as (
    select coalesce(max(position), 0) + 1 as position, lpad(to_hex(greatest(
        (extract(epoch from parley_now()) * 1000)::bigint, coalesce(max(ms), 0) + 1)), 12, '0') || '-0000' as stamp
    from last)
"""
# A chat that was deleted comes back; the title of a new one gives way to whatever a device calls it. Others may name
# `message`: its one row is there unless the id was used.
_QUESTION_SAVED = f"""
{_NEXT}, was as (
    select is_deleted, is_purged from chats where user_id = $1 and id = $2),
chat as (
    insert into chats as c (user_id, id, title, seq) values ($1, $2, $3, $7)
    on conflict (user_id, id) do update set updated_at = now(), is_deleted = false, is_purged = false,
        is_emptied = false, title = case when c.is_purged then excluded.title else c.title end,
        seq = case when c.is_deleted then excluded.seq else c.seq end,
        origin = case when c.is_deleted then '' else c.origin end,
        client = case when c.is_deleted then '' else c.client end,
        stamp = case when c.is_deleted then greatest(c.stamp, (select stamp from next)) else c.stamp end),
message as (
    insert into messages (user_id, chat_id, id, content, role, attachments, position, stamp, seq)
    select $1, $2, $4, $5, 'user', $6, position, stamp, $7 from next
    on conflict (user_id, id) do nothing
    returning position)
"""
_SAVED = """
select (select position from message) as position, coalesce((select is_deleted from was), false) as came_back,
    coalesce((select is_purged from was), false) as was_purged
"""
# What was left of a purged chat when it was asked something again, or came late to it. Devices may have more of it, and
# were told that it is gone for good: they begin anew.
_REOPEN = "delete from messages where user_id = $1 and chat_id = $2 and id <> $3"
_BEGIN_ANEW = "update sync_head set gc_seq = seq where user_id = $1"
# Devices may have been faster than the question.
_ASK_STORED = """
update messages set is_asked = true, updated_at = now()
where user_id = $1 and id = $2 and chat_id = $3 and content = $4 and role = 'user' and status = 'complete'
    and not is_deleted and not is_asked
returning position, created_at
"""
_SAVE_ANSWER = f"""
with {_NEXT}, chat as (
    update chats set updated_at = now() where user_id = $1 and id = $2 returning is_deleted)
insert into messages (user_id, chat_id, id, content, role, status, attachments, position, stamp, seq)
select $1, $2, $3, $4, 'assistant', $5, $6, position, stamp, $7 from next
on conflict (user_id, id) do nothing
returning not coalesce((select is_deleted from chat), false)
"""
_HAS_CHAT = "select exists (select from chats where user_id = $1 and id = $2)"
_QUESTION = "select content, position from messages where user_id = $1 and id = $2 and role = 'user' and not is_deleted"
# No text is read but what is told: messages of devices and of files may be longer than all of that together.
_HISTORY = """
select role, content from (
    select role, content, position, sum(octet_length(content)) over (order by position desc) as so_far from (
        select role, content, position from messages
        where user_id = $1 and chat_id = $2 and not is_deleted and status <> 'failed' and role <> 'system'
            and position < $4
        order by position desc limit $3) newest) sized
where so_far <= $5 order by position desc
"""


@dataclass(frozen=True, slots=True)
class Saved:
    """Where a question stands in its chat. `came_back`: the chat had been deleted.

    `brought_at`: when one of the user's devices had brought it, unless it is new.
    """

    position: int
    came_back: bool
    brought_at: datetime | None = None


async def save_question(
    connection: Connection,
    *,
    user_id: str,
    chat_id: str,
    message_id: str,
    content: str,
    attachments: Sequence[Attachment] = (),
    seq: int | None = None,
    along: Sequence[Part] = (),
) -> Saved:
    """The user's message at the end of its chat, which is made where it is new. Raises Conflict for a used id.

    The caller holds the lock of the chat's session, so positions of nobody's messages do not collide either. `seq`:
    what the caller had of `advance`, where it has called it; `along`: what is written in the same round trip.
    """
    if seq is None:
        seq = await advance(connection, user_id)
    values = (user_id, chat_id, title_from(content), message_id, content, orjson.dumps(attachments).decode(), seq)
    row = await fetch_together(connection, [Part(_QUESTION_SAVED, values), *along], _SAVED)
    if row["was_purged"]:
        await connection.execute(_REOPEN, user_id, chat_id, message_id)
        await connection.execute(_BEGIN_ANEW, user_id)
    if row["position"] is not None:
        return Saved(row["position"], row["came_back"])
    stored = await connection.fetchrow(_ASK_STORED, user_id, message_id, chat_id, content)
    if stored is None:
        raise Conflict("message_exists", "A message with this client_message_id was stored before; choose a new id.")
    return Saved(stored["position"], row["came_back"], stored["created_at"])


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
    """The assistant's message; saving it again under the same id changes nothing. Whether it is new, in a chat that
    was not deleted meanwhile: an answer does not bring one back.
    """
    kept, seq = orjson.dumps(attachments).decode(), await advance(connection, user_id)
    new = await connection.fetchval(_SAVE_ANSWER, user_id, chat_id, message_id, content, status, kept, seq)
    return bool(new)


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
    connection: Connection | Pool,
    *,
    user_id: str,
    chat_id: str,
    limit: int,
    max_bytes: int,
    before: int | None = None,
) -> list[Message]:
    """The last messages of a chat within both bounds, or of what stands before a position of it, oldest first."""
    start = _NO_POSITION if before is None else before
    rows = await connection.fetch(_HISTORY, user_id, chat_id, limit, start, max_bytes)
    return [Message(row["role"], row["content"]) for row in reversed(rows)]
