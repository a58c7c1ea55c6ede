"""queued_messages: what a user sent while an answer was under way, in the order in which it will have its turn.

Every statement runs under the lock of the session's row. Bounded per session and per user when a message is added.
"""

from dataclasses import dataclass, replace
from datetime import datetime
from uuid import UUID, uuid4

import asyncpg

from app.errors import Conflict, NotFound, TooMany
from app.expiry import Expired
from app.flows.incoming import Incoming, decode, encode
from app.postgres import Connection, Pool

_COUNT = """
select count(*) as everywhere, count(*) filter (where session_id = $2) as here from queued_messages where user_id = $1
"""
_IS_STORED = "select exists (select from messages where user_id = $1 and id = $2)"
_ADD = """
insert into queued_messages (user_id, session_id, message_id, stream_id, chatbot_id, text, request, place)
select $1, $2, $3, $4, $5, $6, $7,
       case when $8 then coalesce(min(place), 0) - 1 else coalesce(max(place), 0) + 1 end
from queued_messages where user_id = $1 and session_id = $2
"""
_FIRST = """
select message_id, stream_id, chatbot_id, text, request from queued_messages
where user_id = $1 and session_id = $2 order by place limit 1
"""
_ONE = """
select message_id, stream_id, chatbot_id, text, request from queued_messages
where user_id = $1 and session_id = $2 and message_id = $3
"""
_TAKE = "delete from queued_messages where stream_id = $1"
_LIST = """
select message_id, stream_id, chatbot_id, text, created_at, updated_at from queued_messages
where user_id = $1 and session_id = $2 order by place
"""
_EDIT = """
update queued_messages set text = $4, updated_at = now() where user_id = $1 and session_id = $2 and message_id = $3
returning stream_id
"""
_REMOVE = """
delete from queued_messages where user_id = $1 and session_id = $2 and message_id = $3 returning stream_id
"""
_TO_FRONT = """
update queued_messages set place = (
    select min(place) - 1 from queued_messages where user_id = $1 and session_id = $2)
where user_id = $1 and session_id = $2 and message_id = $3
returning stream_id
"""
_FIND = """
select user_id, session_id, message_id from queued_messages where stream_id = $1 and ($2::text is null or user_id = $2)
"""
# Sessions whose turn has come and that nobody has given it: their replica has gone in between, or it was draining.
_OLD = """
select user_id, session_id, message_id, created_at from queued_messages
where created_at < parley_now() - make_interval(secs => $1) order by created_at limit $2
"""
_COUNT_OLD = f"""
select count(*) as rows, extract(epoch from parley_now() - min(created_at))::float8 as age_s from ({_OLD}) old
"""
_DUE = """
select distinct q.user_id, q.session_id from queued_messages q
join conversation_sessions s on s.user_id = q.user_id and s.id = q.session_id
where s.status = 'idle' limit $1
"""


@dataclass(frozen=True, slots=True)
class Room:
    """The most messages that wait in a session, and of a user."""

    session: int
    user: int


@dataclass(frozen=True, slots=True)
class Waiting:
    """A queued message as its user sees it."""

    message_id: str
    stream_id: UUID
    chatbot_id: str
    text: str
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True, slots=True)
class Turn:
    """A message whose turn comes, and the stream that will answer it."""

    stream_id: UUID
    incoming: Incoming


async def add(
    connection: Connection, incoming: Incoming, *, session_id: str, stream_id: UUID, room: Room, first: bool
) -> None:
    """At the end of the queue, or at its front. Raises TooMany when it is full and Conflict for a used message id."""
    ((everywhere, here),) = await connection.fetch(_COUNT, incoming.user_id, session_id)
    if here >= room.session:
        raise _full(f"{room.session} messages wait in this session")
    if incoming.user_id and everywhere >= room.user:
        raise _full(f"{room.user} messages of this user wait")
    message_id = incoming.message_id or str(uuid4())
    values = (incoming.user_id, session_id, message_id, stream_id, incoming.chatbot_id, incoming.text)
    try:
        if await connection.fetchval(_IS_STORED, incoming.user_id, message_id):
            raise _exists()
        await connection.execute(_ADD, *values, encode(incoming), first)
    except asyncpg.UniqueViolationError:
        raise _exists() from None


def _full(why: str) -> TooMany:
    return TooMany("queue_full", f"{why} already; let them be answered first.", retry_after=5)


def _exists() -> Conflict:
    return Conflict("message_exists", "A message with this client_message_id was stored before; choose a new id.")


async def first(connection: Connection | Pool, *, user_id: str, session_id: str) -> Turn | None:
    """The message whose turn comes next."""
    row = await connection.fetchrow(_FIRST, user_id, session_id)
    return None if row is None else _turn(row, user_id, session_id)


async def find(connection: Connection, *, user_id: str, session_id: str, message_id: str) -> Turn:
    """Raises NotFound for a message that does not wait any more."""
    row = await connection.fetchrow(_ONE, user_id, session_id, message_id)
    if row is None:
        raise not_queued()
    return _turn(row, user_id, session_id)


def _turn(row: asyncpg.Record, user_id: str, session_id: str) -> Turn:
    names = {"user_id": user_id, "chatbot_id": row["chatbot_id"], "session_id": session_id}
    incoming = replace(decode(row["request"], **names, text=row["text"]), message_id=row["message_id"])
    return Turn(row["stream_id"], incoming)


async def take(connection: Connection, stream_id: UUID) -> None:
    """Out of the queue."""
    await connection.execute(_TAKE, stream_id)


async def listed(connection: Connection, *, user_id: str, session_id: str) -> list[Waiting]:
    """In the order of their turns."""
    return [Waiting(*row) for row in await connection.fetch(_LIST, user_id, session_id)]


async def edit(connection: Connection, *, user_id: str, session_id: str, message_id: str, text: str) -> UUID:
    """Returns the stream of the message. Raises NotFound for a message that does not wait any more."""
    stream_id: UUID | None = await connection.fetchval(_EDIT, user_id, session_id, message_id, text)
    if stream_id is None:
        raise not_queued()
    return stream_id


async def remove(connection: Connection, *, user_id: str, session_id: str, message_id: str) -> UUID:
    """Returns the stream of the message. Raises NotFound for one that does not wait any more."""
    stream_id: UUID | None = await connection.fetchval(_REMOVE, user_id, session_id, message_id)
    if stream_id is None:
        raise not_queued()
    return stream_id


async def to_front(connection: Connection, *, user_id: str, session_id: str, message_id: str) -> UUID:
    """Returns the stream of the message. Raises NotFound for one that does not wait any more."""
    stream_id: UUID | None = await connection.fetchval(_TO_FRONT, user_id, session_id, message_id)
    if stream_id is None:
        raise not_queued()
    return stream_id


async def of_stream(connection: Connection, stream_id: UUID, *, owner: str | None) -> tuple[str, str, str] | None:
    """User, session and message of a queued stream of this user; with None, of anybody's."""
    row = await connection.fetchrow(_FIND, stream_id, owner)
    return (row["user_id"], row["session_id"], row["message_id"]) if row else None


async def due(pool: Pool, most: int) -> list[tuple[str, str]]:
    """Sessions that are idle although messages wait in them."""
    return [(row["user_id"], row["session_id"]) for row in await pool.fetch(_DUE, most)]


async def old(pool: Pool, keep_s: float, most: int) -> list[tuple[str, str, str]]:
    """Messages that have waited for longer: their user, session and id."""
    return [(row["user_id"], row["session_id"], row["message_id"]) for row in await pool.fetch(_OLD, keep_s, most)]


async def count_old(pool: Pool, keep_s: float, most: int) -> Expired:
    row = await pool.fetchrow(_COUNT_OLD, keep_s, most)
    assert row is not None
    return Expired(row["rows"], (row["age_s"] or keep_s) - keep_s)


def not_queued() -> NotFound:
    return NotFound("message_not_queued", "No such message waits in this session; it may have had its turn.")
