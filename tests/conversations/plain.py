"""A table with a conversation's messages in plain columns, its shape, and its count from the beginning."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import asyncpg

from app.conversations.batch import Batch
from app.conversations.sources.shape import Key, Message, Row, Session, Skipped, Time
from app.conversations.summary import Said, Summaries, fold

_SERIAL = Key('"id"', True, '"id" = any($1::text[]::int8[])')
MADE = "create table chat (id bigserial primary key, session text, at timestamptz default now(), text text, n int)"
MADE_OF_UUIDS = """
create table chat (id uuid primary key default gen_random_uuid(), session text,
    at timestamptz default clock_timestamp(), text text, n int)
"""


@dataclass(frozen=True, slots=True)
class Plain:
    """Rows without a session are skipped."""

    kind: str = "plain"
    table: str = '"public"."chat"'
    key: Key = _SERIAL
    time: Time | None = None
    session: Session | None = None
    reads: Sequence[str] = ('"id"', '"session"', '"at"', '"text"')
    tells: Sequence[str] = ()

    def said(self, row: Row) -> Said | Skipped:
        key, session, at, text = (row[column] for column in range(4))
        if session is None:
            return Skipped("no_conversation")
        rank = key if isinstance(key, int) else int(at.timestamp() * 1e6)
        return Said(session, "", rank, str(key), "user", at, text)

    def messages(self, row: Row) -> Sequence[Message]:
        return ()


# Rows of a conversation are found by its id: in a scan of the whole table, or by an index.
SCANNED = Plain(session=Session('"session"', "text", '"session" = $1::text', False))
BY_SESSION = Plain(session=Session('"session"', "text", '"session" = $1::text', True))
OF_UUIDS = Plain(
    key=Key('"id"', False, '"id" = any($1::text[]::uuid[])'), reads=('"id"::text', '"session"', '"at"', '"text"')
)


async def alone(connection: asyncpg.Connection) -> None:
    """Wait for all who write on the server, where databases of other tests are made and dropped."""
    now = await connection.fetchval("select pg_snapshot_xmax(pg_current_snapshot())")
    async with asyncio.timeout(30):
        while not await connection.fetchval("select pg_snapshot_xmin(pg_current_snapshot()) >= $1", now):
            await asyncio.sleep(0.01)


async def recounted(connection: asyncpg.Connection, shape: Plain) -> Summaries:
    """What a count over the whole table says."""
    rows = await connection.fetch(f"select {', '.join(shape.reads)} from {shape.table}")
    said = (one for row in rows if not isinstance(one := shape.said(row), Skipped))
    return fold(said, most_keys=Batch.of(shape).most_keys)


_INDEXED = """
select username, conversation_id, message_count, total_tokens, first_message_at, last_message_at,
    first_question_rank, first_question, last_question_rank, last_question, message_ranks, message_ids
from conversations where source = $1
"""


async def indexed(connection: asyncpg.Connection, source: str = "plain") -> dict[tuple[str, str], tuple[Any, ...]]:
    return {tuple(row)[:2]: tuple(row)[2:] for row in await connection.fetch(_INDEXED, source)}


def as_indexed(summaries: Summaries) -> dict[tuple[str, str], tuple[Any, ...]]:
    none = (None, "")
    return {
        name: (
            *(of.messages, of.tokens, of.first_at, of.last_at, *(of.first_question or none)),
            *(*(of.last_question or none), [rank for rank, _ in of.keys], [key for _, key in of.keys]),
        )
        for name, of in summaries.items()
    }
