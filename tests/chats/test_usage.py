"""What was used: each call of a provider once, however it is added up, and nothing for what is synchronised."""

import asyncio
import random
from datetime import UTC, date, datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg
import httpx2
import pytest

from app.access import keys
from app.chats import usage
from app.chats.usage import Entry, UsageDays
from app.postgres import Connection, Pool, open_pool
from tests.access.users import as_user, serving_users
from tests.house import Open, flow
from tests.sync.test_gateway import add, sync

_LEDGER = """
select count(*) as calls, count(*) filter (where outcome = 'failed') as failed, sum(prompt_tokens) as prompt_tokens,
    sum(completion_tokens) as completion_tokens, sum(duration_ms) as duration_ms from usage_ledger
"""
_FIGURES = ("calls", "failed", "prompt_tokens", "completion_tokens", "duration_ms")
_EVER = {"since": date(2000, 1, 1), "until": date(2100, 1, 1)}


def entry(number: int, chance: random.Random, **fields: Any) -> Entry:
    given: dict[str, Any] = {
        "stream_id": UUID(int=number),
        "flow": "main",
        "attempt": 1,
        "user_id": chance.choice("abcde"),
        "chatbot_id": chance.choice("xy"),
        "provider": "demo",
        "model": chance.choice(("small", "large")),
        "outcome": chance.choice(("completed", "completed", "failed", "cancelled")),
        "error_code": None,
        "prompt_tokens": chance.randrange(100),
        "completion_tokens": chance.randrange(1000),
        "first_token_ms": None,
        "duration_ms": chance.randrange(5000),
        "started_at": datetime.now(UTC),
        "chat_id": "c",
    }
    return Entry(**given | fields)


async def _save(pool: Pool, chance: random.Random, numbers: range) -> None:
    """Rows that are committed late, or twice, or not at all, of several days."""
    for number in numbers:
        async with pool.acquire() as connection:
            transaction = connection.transaction()
            await transaction.start()
            await usage.record(connection, [entry(number, chance), entry(number - 1, chance)])
            await connection.execute(
                "update usage_ledger set created_at = now() - interval '1 day' * $1 where stream_id = $2",
                *(chance.randrange(3), UUID(int=number)),
            )
            await asyncio.sleep(chance.choice((0, 0, 0.003)))
            await (transaction.rollback() if chance.random() < 0.2 else transaction.commit())


async def _add_up(pool: Pool, saving: "asyncio.Future[Any]", chance: random.Random) -> None:
    days = UsageDays(pool, piece=7)
    while not saving.done():
        passing = asyncio.ensure_future(days.run_once())
        if chance.random() < 0.3:
            await asyncio.sleep(chance.choice((0, 0.001)))
            passing.cancel()
        await asyncio.wait([passing])


async def _compare(connection: Connection) -> None:
    """What is told, and what the ledger says at the same moment."""
    async with connection.transaction(isolation="repeatable_read"):
        told = {group: await usage.used(connection, group, **_EVER, user_id=None) for group in ("day", "model")}
        ledger = await connection.fetchrow(_LEDGER)
    assert ledger is not None
    for rows in told.values():
        assert [sum(row[name] for row in rows) for name in _FIGURES] == [ledger[name] or 0 for name in _FIGURES]


async def test_every_call_counts_once_while_passes_are_killed_and_rows_come_late(database: str) -> None:
    chance = random.Random(7)
    pool, look = await open_pool(database, 12), await asyncpg.connect(database)
    numbers = [range(start, start + 60) for start in range(1, 240, 60)]
    saving = asyncio.gather(*(_save(pool, chance, some) for some in numbers))
    passes = [asyncio.ensure_future(_add_up(pool, saving, chance)) for _ in range(3)]
    while not saving.done():
        await _compare(look)
    await asyncio.gather(saving, *passes)
    await _compare(look)
    await UsageDays(pool).run_once()
    assert await look.fetchval("select count(*) from usage_ledger where not is_added_up") == 0
    assert await look.fetchval("select sum(calls) from user_usage_daily") > 100
    await _compare(look)
    days = await usage.used(look, "day", **_EVER, user_id="a")
    assert [row["name"] for row in days] == sorted((row["name"] for row in days), reverse=True)
    of_a = await look.fetchval("select count(*) from usage_ledger where user_id = 'a'")
    assert sum(row["calls"] for row in days) == of_a
    await pool.close()
    await look.close()


async def _used(client: httpx2.AsyncClient, **params: str) -> list[dict[str, Any]]:
    response = await client.get("/api/usage", params=params)
    assert response.status_code == 200, response.text
    told: list[dict[str, Any]] = response.json()["usage"]
    return told


@pytest.mark.parametrize("added_up", [False, True])
async def test_what_a_user_has_used_is_told_up_to_the_last_call(house: Open, added_up: bool) -> None:
    async with house(enable_background_jobs=False) as home:
        await home.apply(other={"flows": {"main": flow("Hi there")}})
        for _ in range(2):
            await home.ask("quick")
        await home.ask("other")
        await home.ask("quick", user_id="bob")
        if added_up:
            await _roll_up(home.database)
        await home.ask("quick")
        (today,) = await _used(home.client, user_id="ann")
        assert (today["name"], today["calls"], today["failed"]) == (datetime.now(UTC).date().isoformat(), 4, 0)
        assert today["totalTokens"] == today["promptTokens"] + today["completionTokens"] > 60
        assert [(one["name"], one["calls"]) for one in await _used(home.client, user_id="ann", group="chatbot")] == [
            ("quick", 3),
            ("other", 1),
        ]
        everybody = await _used(home.client, group="model")
        assert sum(one["calls"] for one in everybody) == 5
        tomorrow = (datetime.now(UTC).date() + timedelta(days=1)).isoformat()
        assert await _used(home.client, **{"from": tomorrow, "to": tomorrow}) == []
        for wrong in ({"group": "user"}, {"from": "2020-01-01", "to": "2024-01-01"}, {"from": "x"}):
            refused = await home.client.get("/api/usage", params=wrong)
            assert (refused.status_code, refused.json()["code"]) == (400, "bad_parameter")


async def _roll_up(connection: asyncpg.Connection) -> None:
    await connection.fetchval(usage._ADD_UP, 1000)


async def test_users_are_told_of_themselves(database: str) -> None:
    pool, look = await open_pool(database, 2), await asyncpg.connect(database)
    chance = random.Random(1)
    mixed = [entry(number, chance, user_id=who) for number, who in enumerate(("ann", "ann", "bob"))]
    await usage.record(look, mixed[:1])
    await UsageDays(pool).run_once()
    await usage.record(look, mixed[1:])
    async with serving_users(database, enable_background_jobs=False) as client:

        async def asked(who: str, **params: str) -> tuple[int, int | str]:
            response = await client.get("/api/usage", params=params, headers=as_user(who))
            told = response.json()
            return response.status_code, told.get("code") or sum(one["calls"] for one in told["usage"])

        assert [await asked("ann"), await asked("bob"), await asked("eve")] == [(200, 2), (200, 1), (200, 0)]
        assert await asked("bob", username="ann") == (403, "user_mismatch")
        key = await keys.create(look, "reader", ["read"])
        assert [await asked(key), await asked(key, username="ann")] == [(200, 3), (200, 2)]
        assert await asked(await keys.create(look, "sync only", ["sync"])) == (403, "scope_missing")
    await pool.close()
    await look.close()


async def test_a_history_of_10000_messages_synchronised_twice_costs_nothing(house: Open) -> None:
    async with house(enable_background_jobs=False) as home:
        await home.ask(session_id="c0")
        before = await _used(home.client, user_id="ann", group="model")
        await _roll_up(home.database)
        rows = await home.database.fetch("select * from user_usage_daily")
        for device in ("phone", "phone", "desk"):
            for part in range(10):
                ops = [add(f"m{part}-{number}", f"c{part}", at=number) for number in range(1, 1001)]
                pieces = [ops[start : start + 100] for start in range(0, 1000, 100)]
                await sync(home.client, device, *pieces, first=1 + 10 * part)
        assert await home.count("messages") == 10_002
        await _roll_up(home.database)
        assert await _used(home.client, user_id="ann", group="model") == before
        assert await home.database.fetch("select * from user_usage_daily") == rows
