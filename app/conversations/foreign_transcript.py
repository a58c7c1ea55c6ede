"""One conversation of another program, read from its table: a page of rows that the index has counted."""

from collections.abc import Sequence
from dataclasses import dataclass

import asyncpg
import structlog

from app.conversations.sources.reading import open_source
from app.conversations.sources.recognition import recognise
from app.conversations.sources.shape import Message, Shape, Skipped
from app.conversations.sources.source import Source, all_sources
from app.conversations.summary import KEYS
from app.conversations.transcript import Named
from app.errors import Misconfigured, Unavailable
from app.postgres import AWAY, Connection, Pool

log = structlog.get_logger(__name__)

# By conversation or by keys; in the order of their keys where a sequence gives them out, else of their times.
_ROWS = "select {columns} from {table} where {condition} order by {order} limit $2 offset $3"
_AWAY = "The source's database cannot be read now; the server's log says why."


@dataclass(frozen=True, slots=True)
class ForeignMessages:
    """What a page of rows says, with the key of each row; `behind` counts the rows before the next page."""

    messages: Sequence[tuple[str, Message]]
    behind: int | None


async def find_source(connection: Connection | Pool, source_id: str) -> Source:
    """Raises Unavailable for one that is not configured any more."""
    for source in await all_sources(connection):
        if source.id == source_id:
            return source
    raise Unavailable("source_unavailable", "The source is not configured any more.", retry_after=300)


async def foreign_messages(source: Source, named: Named, *, after: int, size: int) -> ForeignMessages:
    """Messages behind so many rows of a conversation. Raises Unavailable where its table cannot be read now."""
    try:
        connection = await open_source(source.dsn)
        try:
            return await _page(connection, await recognise(connection, source), named, after=after, size=size)
        finally:
            connection.terminate()
    except (Misconfigured, *AWAY, asyncpg.PostgresError) as error:
        why = error.detail if isinstance(error, Misconfigured) else type(error).__name__
        log.warning("source_unread", source=source.id, why=why)
        raise Unavailable("source_unavailable", _AWAY, retry_after=10) from None


async def _page(connection: Connection, shape: Shape, named: Named, *, after: int, size: int) -> ForeignMessages:
    condition, given = _which(shape, named)
    sql = _ROWS.format(
        columns=", ".join([*shape.reads, *shape.tells]), table=shape.table, condition=condition, order=_order(shape)
    )
    rows = await connection.fetch(sql, given, size + 1, after)
    messages = [
        (str(row[0]), message)
        for row in rows[:size]
        if _is_of(shape, row, named)
        for message in shape.messages(tuple(row)[len(shape.reads) :])
    ]
    return ForeignMessages(messages, after + size if len(rows) > size else None)


def _which(shape: Shape, named: Named) -> tuple[str, object]:
    """By the conversation's id where that is quick, or where the index does not hold all of its keys."""
    session = shape.session
    if session is not None and (session.is_indexed or not 0 < len(named.keys) < KEYS):
        return session.condition, named.id
    return shape.key.condition, list(named.keys)


def _order(shape: Shape) -> str:
    if shape.key.is_serial or shape.time is None:
        return shape.key.column
    return f"{shape.time.expression} nulls first, {shape.key.column}"


def _is_of(shape: Shape, row: asyncpg.Record, named: Named) -> bool:
    """Other users may have conversations of this id, too."""
    said = shape.said(row)
    return not isinstance(said, Skipped) and (said.conversation_id, said.username) == (named.id, named.username)
