"""A user's chats as a file: read a piece at a time in one snapshot, so that it is as everything was at one moment."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from time import monotonic
from typing import Any, Literal, Protocol

import asyncpg
import orjson

from app.answers import time_of
from app.errors import Unavailable
from app.postgres import Connection
from app.sync import chats
from app.wall import Wall

Format = Literal["json", "markdown"]
# What a file of ours says of itself.
NAME, VERSION = "parley", 1
# Chats and messages that are read at once; of messages 4 MiB at most, too.
_CHATS, _MESSAGES = 200, 500
# Nobody keeps a snapshot for longer: it keeps PostgreSQL from cleaning up. And how long it may wait for a slow reader.
_WHOLE_S, _IDLE_S = 900, 60

_SNAPSHOT = f"""
set transaction isolation level repeatable read, read only;
set local idle_in_transaction_session_timeout = '{_IDLE_S}s'
"""
_COLUMNS = "id, title, parent_chat_id, branch_from_message_id, created_at"
_PAGE = f"select {_COLUMNS} from chats where user_id = $1 and id > $2 and not is_deleted order by id limit {_CHATS}"
_ONE = f"select {_COLUMNS} from chats where user_id = $1 and id = $2 and not is_deleted"
_SAYS = {"user": "User", "assistant": "Assistant", "system": "Instructions"}


class _Style(Protocol):
    """How a file is written; each of them returns what comes next in it."""

    def begin(self, now: datetime) -> bytes: ...
    def chat(self, chat: asyncpg.Record, *, first: bool) -> bytes: ...
    def messages(self, rows: Sequence[asyncpg.Record], *, first: bool) -> bytes: ...
    def end_chat(self) -> bytes: ...
    def end(self) -> bytes: ...


class _Json:
    """What `POST /api/chats/import` takes."""

    def begin(self, now: datetime) -> bytes:
        head = orjson.dumps({"format": NAME, "version": VERSION, "exportedAt": time_of(now)})
        return head[:-1] + b',"chats":['

    def chat(self, chat: asyncpg.Record, *, first: bool) -> bytes:
        told = {
            "id": chat["id"],
            "title": chat["title"],
            "createdAt": time_of(chat["created_at"]),
            "parentChatId": chat["parent_chat_id"],
            "branchFromMessageId": chat["branch_from_message_id"],
        }
        return (b"\n" if first else b",\n") + orjson.dumps(told)[:-1] + b',"messages":['

    def messages(self, rows: Sequence[asyncpg.Record], *, first: bool) -> bytes:
        lines = b",\n".join(orjson.dumps(_message(row)) for row in rows)
        return lines if first or not lines else b",\n" + lines

    def end_chat(self) -> bytes:
        return b"]}"

    def end(self) -> bytes:
        return b"\n]}\n"


def _message(row: asyncpg.Record) -> Mapping[str, Any]:
    told = {"id": row["id"], "role": row["role"], "content": row["content"], "timestamp": time_of(row["timestamp"])}
    told |= {"parentId": row["parent_id"]} if row["parent_id"] else {}
    told |= {"status": row["status"]} if row["status"] != "complete" else {}
    return told | ({"attachments": orjson.Fragment(row["attachments"])} if row["attachments"] != "[]" else {})


class _Markdown:
    """For people: what was said, by whom and when."""

    def begin(self, now: datetime) -> bytes:
        return f"Exported on {now:%Y-%m-%d at %H:%M} UTC\n".encode()

    def chat(self, chat: asyncpg.Record, *, first: bool) -> bytes:
        return f"\n# {' '.join(chat['title'].split()) or 'Chat'}\n".encode()

    def messages(self, rows: Sequence[asyncpg.Record], *, first: bool) -> bytes:
        return b"".join(_said(row) for row in rows)

    def end_chat(self) -> bytes:
        return b""

    def end(self) -> bytes:
        return b""


def _said(row: asyncpg.Record) -> bytes:
    broken = ", broken off" if row["status"] == "partial" else ""
    head = f"\n## {_SAYS[row['role']]}, {row['timestamp']:%Y-%m-%d %H:%M}{broken}\n"
    return f"{head}\n{row['content']}\n".encode()


_STYLES: Mapping[Format, _Style] = {"json": _Json(), "markdown": _Markdown()}


@dataclass(frozen=True, slots=True)
class Export:
    """All chats of a user, or the one that is named, in one file."""

    wall: Wall
    user_id: str
    chat_id: str | None = None
    format: Format = "json"

    async def parts(self) -> AsyncGenerator[bytes, None]:
        """The file, piece by piece: a few MiB each at most. Raises NotFound before the first one.

        The connection waits for whoever takes the pieces, but not for long.
        """
        style, until, first = _STYLES[self.format], monotonic() + _WHOLE_S, True
        async with self._snapshot() as connection:
            if self.chat_id is not None:
                await chats.require(connection, self.user_id, self.chat_id)
            yield style.begin(await connection.fetchval("select now() at time zone 'utc'"))
            async for chat in self._chats(connection):
                yield style.chat(chat, first=first)
                first = False
                async for rows, begins in self._messages(connection, chat["id"]):
                    if monotonic() > until:
                        raise Unavailable("overloaded", f"An export takes {_WHOLE_S} seconds at most.")
                    yield style.messages(rows, first=begins)
                yield style.end_chat()
            yield style.end()

    @asynccontextmanager
    async def _snapshot(self) -> AsyncGenerator[Connection, None]:
        async with self.wall.connection() as connection:
            if connection.is_in_transaction():
                await connection.execute(_SNAPSHOT)
                yield connection
                return
            async with connection.transaction():
                await connection.execute(_SNAPSHOT)
                yield connection

    async def _chats(self, connection: Connection) -> AsyncGenerator[asyncpg.Record, None]:
        if self.chat_id is not None:
            for row in await connection.fetch(_ONE, self.user_id, self.chat_id):
                yield row
            return
        after = ""
        while rows := await connection.fetch(_PAGE, self.user_id, after):
            for row in rows:
                yield row
            after = rows[-1]["id"]

    async def _messages(
        self, connection: Connection, chat_id: str
    ) -> AsyncGenerator[tuple[Sequence[asyncpg.Record], bool], None]:
        """Pages, and whether it is the first one."""
        after: int | None = None
        while True:
            page = await chats.messages(connection, self.user_id, chat_id, size=_MESSAGES, after=after)
            yield page.rows, after is None
            if page.behind is None:
                return
            after = page.behind
