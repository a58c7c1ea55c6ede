"""Whole histories, as front ends send them that keep no cursor: compared with what is stored, and merged where they say
something new.
"""

from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

import asyncpg
import orjson

from app.answers import time_of
from app.postgres import Connection
from app.sync import chats, merge, rows
from app.sync.arrivals import own_id
from app.sync.changes import Changes
from app.sync.merge import LEAST, AddMessage, Chat, Op, PutChat, State
from app.sync.rows import CHAT
from app.wall import Wall

# Compared at once: messages and chats, and characters of text, of which there may be one message more.
_MOST, _MOST_TEXT = 500, 2 << 20
# Chats and messages that are read at once; of messages 4 MiB at most, too.
_CHATS, _MESSAGES = 200, 500
# Whoever writes has the time of when its transaction began, and none takes that long.
_OVERLAP = timedelta(minutes=1)

_NOW = "select parley_now() as at, (extract(epoch from parley_now()) * 1000)::bigint as ms"
_KNOWN = f"select {CHAT} from chats where user_id = $1 and id = any($2::text[])"
_SINCE = """
($3::timestamptz is null or c.updated_at > $3 or exists (
    select from messages m where m.user_id = $1 and m.chat_id = c.id and m.updated_at > $3))
"""
_CHANGED = f"""
select c.id, c.title, coalesce(first.at, c."timestamp") as created_at, greatest(last.at, case when c.stamp > $4
    then to_timestamp(('x' || left(c.stamp, 12))::bit(48)::bigint / 1000.0) else c."timestamp" end) as updated_at
from chats c
left join lateral (
    select "timestamp" as at from messages where user_id = $1 and chat_id = c.id and not is_deleted
    order by position limit 1) first on true
left join lateral (
    select "timestamp" as at from messages where user_id = $1 and chat_id = c.id and not is_deleted
    order by position desc limit 1) last on true
where c.user_id = $1 and c.id > $2 and not c.is_deleted and {_SINCE} order by c.id limit {_CHATS}
"""
_DELETED = """
select id from chats where user_id = $1 and id > $2 and is_deleted and updated_at > $3 order by id limit 5000
"""


@dataclass(frozen=True, slots=True)
class Conversation:
    """All that a front end has of a chat, or a part of it. `stamp` is of its title."""

    id: str
    title: str
    stamp: str
    messages: Sequence[AddMessage]


@dataclass(slots=True)
class _Piece:
    """Parts of conversations, as many as are compared at once."""

    parts: list[Conversation] = field(default_factory=list)
    lines: int = 0
    text: int = 0


async def now_of(wall: Wall) -> datetime:
    async with wall.connection() as connection:
        moment: datetime = (await connection.fetchrow(_NOW))["at"]  # type: ignore[index]
        return moment


@dataclass(frozen=True, slots=True)
class Histories:
    """Of one user."""

    changes: Changes
    wall: Wall
    user_id: str

    async def take(self, conversations: Sequence[Conversation], *, failed: bool) -> None:
        """Merge what is new in them. What is not writes nothing, and takes no lock. Raises Unavailable."""
        for piece in _pieces(conversations):
            if await self._is_new(piece):
                await self.changes.write(self.user_id, _OpsOf(self.user_id, piece.parts), dated=True, failed=failed)

    async def _is_new(self, piece: _Piece) -> bool:
        async with self.wall.connection() as connection:
            now = await connection.fetchrow(_NOW)
            assert now is not None
            ops, state = await _compared(connection, self.user_id, piece.parts)
            state = await _with_derived(connection, self.user_id, ops, state)
        outcomes = (merge.apply(state, op, client="", now_ms=now["ms"]) for op in ops)
        return any(outcome.chats or outcome.messages for outcome in outcomes)

    async def parts(self, since: datetime | None) -> AsyncGenerator[bytes, None]:
        """The whole chats that have changed since then, as JSON, a few MiB at a time; nothing is held between two."""
        synced_at, after = await now_of(self.wall), ""
        since = None if since is None else since - _OVERLAP
        yield b'{"conversations":['
        first = True
        while found := await self._fetch(_CHANGED, after, since, LEAST):
            for chat in found:
                yield (b"" if first else b",") + _opened(chat)
                first = False
                async for part in self._messages(chat["id"]):
                    yield part
                yield b"]}"
            after = found[-1]["id"]
        yield b'],"deleted":'
        async for part in self._deleted(since):
            yield part
        yield b',"syncedAt":' + orjson.dumps(time_of(synced_at)) + b"}"

    async def _messages(self, chat_id: str) -> AsyncGenerator[bytes, None]:
        after: int | None = None
        while True:
            async with self.wall.connection() as connection:
                page = await chats.messages(connection, self.user_id, chat_id, size=_MESSAGES, after=after)
            if page.rows:
                yield (b"" if after is None else b",") + b",".join(orjson.dumps(_told(row)) for row in page.rows)
            if page.behind is None:
                return
            after = page.behind

    async def _deleted(self, since: datetime | None) -> AsyncGenerator[bytes, None]:
        yield b"["
        after = ""
        while since is not None and (found := await self._fetch(_DELETED, after, since)):
            yield (b"," if after else b"") + b",".join(orjson.dumps(row["id"]) for row in found)
            after = found[-1]["id"]
        yield b"]"

    async def _fetch(self, query: str, *values: object) -> Sequence[asyncpg.Record]:
        async with self.wall.connection() as connection:
            return await connection.fetch(query, self.user_id, *values)


def _pieces(conversations: Sequence[Conversation]) -> Iterator[_Piece]:
    piece = _Piece()
    for one in conversations:
        begun: list[AddMessage] = []
        piece.parts.append(replace(one, messages=begun))
        piece.lines += 1
        for message in one.messages:
            if piece.lines >= _MOST or piece.text >= _MOST_TEXT:
                yield piece
                begun = []
                piece = _Piece([replace(one, messages=begun)], 1)
            begun.append(message)
            piece.lines += 1
            piece.text += len(message.content)
    if piece.parts:
        yield piece


@dataclass(frozen=True, slots=True)
class _OpsOf:
    user_id: str
    parts: Sequence[Conversation]

    async def __call__(self, connection: Connection, now_ms: int) -> Sequence[Op]:
        return (await _compared(connection, self.user_id, self.parts))[0]


async def _compared(connection: Connection, user_id: str, parts: Sequence[Conversation]) -> tuple[Sequence[Op], State]:
    """What these say as operations of a device would, all that is known as well; and what is stored under their ids."""
    known = {row["id"]: Chat(*row) for row in await connection.fetch(_KNOWN, user_id, [part.id for part in parts])}
    given = [message for part in parts for message in part.messages]
    state = (await rows.load(connection, user_id, given)).state
    homes = {name: message.chat_id for name, message in state.messages.items()}
    ops: list[Op] = []
    for part in parts:
        have = known.get(part.id)
        ops += _put(part, have)
        ops += [_own(message, have, homes) for message in part.messages if _is_word(message, have)]
    return ops, State(state.chats | known, state.messages)


async def _with_derived(connection: Connection, user_id: str, ops: Sequence[Op], state: State) -> State:
    """What is stored under ids that are not those that were sent, too."""
    others = [op for op in ops if op.id not in state.messages and isinstance(op, AddMessage)]
    if not others:
        return state
    more = (await rows.load(connection, user_id, others)).state
    return State(state.chats | more.chats, state.messages | more.messages)


def _put(part: Conversation, have: Chat | None) -> list[PutChat]:
    """The title, where it is a later one. An old copy that is sent again is no word that lost."""
    if have is None:
        return [PutChat(part.id, part.title, part.stamp)]
    if have.is_purged or have.title == part.title or (part.stamp, "") <= (have.stamp, have.client):
        return []
    return [PutChat(part.id, part.title, part.stamp, have.parent_chat_id, have.branch_from_message_id)]


def _is_word(message: AddMessage, have: Chat | None) -> bool:
    """Whether it can be news: old copies of a purged chat are not."""
    return have is None or not have.is_purged or message.stamp > have.stamp


def _own(message: AddMessage, have: Chat | None, homes: dict[str, str]) -> AddMessage:
    """The message, under an id of its chat's own where another chat's has it."""
    if homes.setdefault(message.id, message.chat_id) == message.chat_id or (have is not None and have.is_purged):
        return message
    return replace(message, id=own_id(message.chat_id, message.id))


def _opened(chat: asyncpg.Record) -> bytes:
    told = {"id": chat["id"], "title": chat["title"]}
    told |= {"createdAt": time_of(chat["created_at"]), "updatedAt": time_of(chat["updated_at"])}
    return orjson.dumps(told)[:-1] + b',"messages":['


def _told(row: asyncpg.Record) -> Mapping[str, Any]:
    return {"id": row["id"], "role": row["role"], "content": row["content"], "timestamp": time_of(row["timestamp"])}
