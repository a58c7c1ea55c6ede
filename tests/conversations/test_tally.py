"""All conversations counted at once: what a count of each by its key says, whatever stands in the tables."""

from collections.abc import Iterable, Mapping
from datetime import timedelta
from random import Random
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from app.conversations.recount import COUNTED
from app.conversations.tally import Tally
from tests.conversations.listed import BEGAN

_KEYS = "select user_id, id from chats"
_TABLES = ("conversations_said", "conversations_asked")


@pytest.mark.parametrize("seed", range(3))
async def test_at_once_is_as_one_by_one(database: str, seed: int) -> None:
    connection = await asyncpg.connect(database)
    await _fill(connection, Random(seed))
    keys = await connection.fetch(_KEYS)
    one_by_one = await connection.fetch(COUNTED, [key[0] for key in keys], [key[1] for key in keys])
    tally = Tally("public")
    async with connection.transaction(isolation="repeatable_read"):
        await tally.read(connection, within_s=10)
        at_once = await connection.fetch(tally.counted)
        await tally.forget(connection)
    assert sorted(map(repr, at_once)) == sorted(repr(row) for row in one_by_one if row["messages"])
    assert 10 < len(at_once) < len(keys)
    assert not await connection.fetch("select from pg_class where relname = any($1)", _TABLES)
    await connection.close()


async def _fill(connection: asyncpg.Connection, chance: Random) -> None:
    """Chats with and without messages, some deleted; messages of no chat; two at one place; runs under way."""
    chats = [(user, f"c{number}") for user in ("ann", "bob") for number in range(12)]
    known = chats[:-3]
    await _insert(connection, "chats", [_chat(chance, *chat) for chat in known])
    spoken = [chat for chat in chats if chance.random() < 0.8]
    await _insert(connection, "messages", [_message(chance, *chance.choice(spoken), n) for n in range(150)])
    runs = [_run(chance, *chance.choice(spoken), n) for n in range(40)]
    await _insert(connection, "streaming_sessions", runs[::2])
    await _insert(connection, "usage_ledger", [_entry(chance, run, n) for n, run in enumerate(runs)])
    sessions = [{"user_id": user, "id": chat, "chatbot_id": chance.choice("pq")} for user, chat in chats[::3]]
    await _insert(connection, "conversation_sessions", sessions)


def _chat(chance: Random, user: str, chat: str) -> Mapping[str, Any]:
    return {"user_id": user, "id": chat, "is_deleted": chance.random() < 0.2}


def _message(chance: Random, user: str, chat: str, number: int) -> Mapping[str, Any]:
    """Of those that count, two at one place say the same: nobody knows which of them was first."""
    position, status = chance.randrange(20), chance.choice(["complete", "complete", "partial", "failed"])
    is_deleted = chance.random() < 0.3
    said = "gone" if is_deleted or status == "failed" else "said"
    return {
        "user_id": user, "id": f"m{number}", "chat_id": chat, "position": position, "status": status,
        "is_deleted": is_deleted, "content": f"{said} at {position} " + "é" * (400 * (position % 2)),
        "role": chance.choice(["user", "user", "assistant", "system"]),
        "created_at": BEGAN + timedelta(minutes=chance.randrange(1000)),
    }  # fmt: skip


def _run(chance: Random, user: str, chat: str, number: int) -> Mapping[str, Any]:
    status = chance.choice(["queued", "active", "completed", "failed"])
    return {
        "id": UUID(int=number), "user_id": user, "session_id": chat, "chatbot_id": "r", "chatbot_version": 1,
        "flow_type": "main", "status": status,
    }  # fmt: skip


def _entry(chance: Random, run: Mapping[str, Any], number: int) -> Mapping[str, Any]:
    return {
        "stream_id": run["id"], "flow": "main", "attempt": 1, "user_id": run["user_id"], "chatbot_id": f"r{number}",
        "provider": "demo", "model": f"m{number}", "outcome": "completed", "prompt_tokens": chance.randrange(9),
        "completion_tokens": 1, "duration_ms": 1, "started_at": BEGAN + timedelta(minutes=number),
        "chat_id": run["session_id"],
    }  # fmt: skip


async def _insert(connection: asyncpg.Connection, table: str, rows: Iterable[Mapping[str, Any]]) -> None:
    for row in rows:
        places = ", ".join(f"${number}" for number in range(1, len(row) + 1))
        await connection.execute(f"insert into {table} ({', '.join(row)}) values ({places})", *row.values())
