"""Conversations of other programs, read from their tables through the gateway."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import asyncpg
import httpx2
import pytest

from app.conversations.discovery import Discovery
from app.conversations.foreign import Foreign
from app.conversations.sources.reading import open_source
from app.conversations.sources.recognition import recognise
from app.conversations.sources.source import apply_sources
from app.postgres import open_pool
from tests.conversations.test_recognition import SOURCE, load
from tests.serving import serving


@asynccontextmanager
async def discovered(database: str, name: str) -> AsyncGenerator[httpx2.AsyncClient, None]:
    """A gateway whose index has what a library wrote into this database."""
    owner, reader, pool = await asyncpg.connect(database), await open_source(SOURCE.dsn), await open_pool(database, 2)
    try:
        source = replace(SOURCE, table=await load(owner, name))
        await apply_sources(owner, [source])
        await Discovery(pool).discover("s", Foreign(reader, await recognise(reader, source)))
    finally:
        await pool.close()
        await reader.close()
        await owner.close()
    async with serving(database, drain_s=0, enable_background_jobs=False) as client:
        yield client


async def walk(client: httpx2.AsyncClient, conversation_id: str, **params: Any) -> list[tuple[str, str]]:
    """All its messages, two rows at a time."""
    said, page = [], {"nextCursor": "0"}
    while page["nextCursor"] is not None:
        url = f"/api/messages/conversations/{conversation_id}"
        response = await client.get(url, params={"size": 2, "cursor": page["nextCursor"], **params})
        assert response.status_code == 200, response.text
        page = response.json()
        said += [(message["role"], message["content"]) for message in page["messages"]]
    return said


@pytest.mark.parametrize("name", ["n8n", "langchain_community", "langchain_postgres", "flowise", "litellm"])
async def test_every_listed_conversation_can_be_read(database: str, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("SOURCE_DSN", database)
    async with discovered(database, name) as client:
        listed = (await client.get("/api/messages/conversations")).json()["conversations"]
        assert listed
        for entry in listed:
            names = {"source": entry["source"], "username": entry["username"]}
            said = await walk(client, entry["conversationId"], **names)
            assert len(said) == entry["messageCount"]
            questions = [text for role, text in said if role == "user" and text]
            assert (questions[0][:300], questions[-1][:300]) == (entry["firstQuestion"], entry["lastQuestion"])


async def test_nobody_elses_rows_of_the_same_conversation_are_told(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DSN", database)
    async with discovered(database, "litellm") as client:
        entries = (await client.get("/api/messages/conversations")).json()["conversations"]
        mine, other = entries[0], entries[1]
        connection = await asyncpg.connect(database)
        await connection.execute(
            """update "LiteLLM_SpendLogs" set session_id = $1 where session_id = $2""",
            *(mine["conversationId"], other["conversationId"]),
        )
        await connection.close()
        assert len(await walk(client, mine["conversationId"])) == mine["messageCount"]


async def test_a_source_that_is_away_is_said_to_be(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DSN", database)
    async with discovered(database, "n8n") as client:
        monkeypatch.setenv("SOURCE_DSN", "postgresql://secret:word@127.0.0.1:9/nothing")
        response = await client.get("/api/messages/conversations/n8n-session-1")
        assert (response.status_code, response.json()["code"]) == (503, "source_unavailable")
        assert "word" not in response.text
