"""Conversations as the index has them, and the list of them as a client reads it."""

from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

import asyncpg
import httpx2

from app.conversations import words
from app.postgres import Connection

BEGAN = datetime(2026, 1, 1, tzinfo=UTC)
INSERT = """
insert into conversations (source, username, conversation_id, chatbot_id, model, first_message_at, last_message_at,
    time_source, message_count, total_tokens, first_question, last_question, message_ids)
values ($1, $2, $3, $4, $5, $6, $7, 'message', 2, 10, $8, $9, '{7,8}')
"""
COUNT = "insert into conversation_counts select source, 0, count(*) from conversations group by source"
SAVE_WORDS = words.saved("(select * from conversations) written")
Row = dict[str, Any]


def rows(chance: Random, count: int, vocabulary: str = "first last") -> list[Row]:
    """Few moments, so that many conversations share one. Questions are of these words."""
    words = vocabulary.split()
    return [
        {
            "source": chance.choice(["parley", "n8n"]),
            "username": chance.choice(["ann", "bob", ""]),
            "conversation_id": f"c{number}",
            "chatbot_id": chance.choice(["shop", "help"]),
            "model": chance.choice(["small", "large"]),
            "first": BEGAN,
            "last": BEGAN + timedelta(minutes=chance.randrange(count // 4 + 1)),
            "first_question": " ".join(chance.choices(words, k=chance.randrange(4))),
            "last_question": " ".join(chance.choices(words, k=chance.randrange(4))),
        }
        for number in range(count)
    ]


async def store(database: str, rows: list[Row]) -> None:
    connection = await asyncpg.connect(database)
    await connection.executemany(INSERT, [tuple(row.values()) for row in rows])
    await connection.execute(COUNT)
    await connection.execute(SAVE_WORDS)
    await connection.close()


async def page(client: httpx2.AsyncClient, **params: Any) -> Row:
    response = await client.get("/api/messages/conversations", params=params)
    assert response.status_code == 200, response.text
    answer: Row = response.json()
    return answer


async def walk(client: httpx2.AsyncClient, **params: Any) -> list[Row]:
    """All pages of a list by cursor."""
    part = await page(client, **params)
    entries: list[Row] = list(part["conversations"])
    total = part["total"]
    while part["nextCursor"]:
        part = await page(client, **params, cursor=part["nextCursor"])
        assert part["conversations"]
        assert part["total"] == total
        entries += part["conversations"]
    assert total == len(entries)
    return entries


async def plan(connection: Connection, statement: tuple[str, list[Any]]) -> str:
    """As the statement is planned when it is prepared: without its values. (`explain` alone would know them.)

    Without the scan of the one row that says whether there is an index.
    """
    sql, values = statement
    await connection.execute(f"prepare asked as {sql}")
    rows = await connection.fetch(f"explain execute asked({', '.join(map(_literal, values))})")
    await connection.execute("deallocate asked")
    return "\n".join(row[0] for row in rows if "Seq Scan on conversation_index " not in row[0])


def _literal(value: object) -> str:
    if isinstance(value, list):
        return "array[" + ", ".join(map(_literal, value)) + "]"
    return str(value) if isinstance(value, int) else "'" + str(value).replace("'", "''") + "'"
