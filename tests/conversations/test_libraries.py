"""What the libraries wrote, from their tables into the index: recognised, discovered, each row once."""

from dataclasses import replace

import asyncpg
import pytest

from app.conversations.discovery import Discovery
from app.conversations.foreign import Foreign
from app.conversations.sources.reading import open_source
from app.conversations.sources.recognition import recognise
from app.postgres import open_pool
from tests.conversations.test_recognition import SOURCE, load

_INDEXED = """
select conversation_id, username, message_count, first_question, last_question, total_tokens, time_source
from conversations where source = 's' order by conversation_id, username
"""


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        (
            "n8n",
            [
                ("n8n-session-1", "", 6, "Which orders are late?", "Since when? 🕰", 0, "discovery"),
                ("n8n-session-2", "", 2, "Hello", "Hello", 0, "discovery"),
            ],
        ),
        (
            "langchain_community",
            [
                ("library-1", "", 8, "Do you have Moby-Dick?", "Thanks \u2028 a lot 🐋", 17, "discovery"),
                ("library-2", "", 1, "Are you open?", "Are you open?", 0, "discovery"),
            ],
        ),
        (
            "flowise",
            [
                ("5e0c2d4b-2222-4f6e-8a54-6f1b3c7e6d3a", "", 2, "Test", "Test", 0, "message"),
                ("visitor-7", "", 4, "What does delivery cost?", "And below?", 0, "message"),
            ],
        ),
        (
            "litellm",
            [
                ("trace-1", "customer-9", 4, "How tall is the Eiffel tower?", "And in feet?", 71, "message"),
                ("trace-2", "ann", 2, "Hello", "Hello", 30, "message"),
            ],
        ),
    ],
)
async def test_captured_tables_are_discovered(
    database: str, monkeypatch: pytest.MonkeyPatch, name: str, rows: list[tuple[object, ...]]
) -> None:
    monkeypatch.setenv("SOURCE_DSN", database)
    owner, reader, pool = await asyncpg.connect(database), await open_source(SOURCE.dsn), await open_pool(database, 2)
    try:
        shape = await recognise(reader, replace(SOURCE, table=await load(owner, name)))
        for created in (len(rows), 0, 0):  # again and again, and each row counts once
            found = await Discovery(pool).discover("s", Foreign(reader, shape))
            assert found.created == created
            assert [tuple(row) for row in await owner.fetch(_INDEXED)] == rows
    finally:
        await pool.close()
        await reader.close()
        await owner.close()
