"""What administrators did is on record: with who did it, in the same transaction, and without a secret."""

from typing import Any

import asyncpg
import pytest

from app.access import audit
from app.access.audit import Actor, audit_expiring
from app.flows import chatbots, file
from app.postgres import open_pool
from tests.access.test_guard import bearer, key_with
from tests.command import run
from tests.serving import serving

_BOT = {
    "providers": {"one": {"kind": "openai", "base_url": "https://api.example/v1", "api_key": "env:KEY"}},
    "chatbot": {"flows": {"main": {"provider": "one", "model": "x", "system": "canary-prompt"}}},
}


async def _entries(database: str) -> list[audit.Entry]:
    """The oldest first."""
    connection = await asyncpg.connect(database)
    try:
        return [*reversed(await audit.last(connection, 100))]
    finally:
        await connection.close()


async def test_a_chatbot_replaced_over_http_is_the_doing_of_its_key(database: str) -> None:
    async with serving(database, auth="keys", drain_s=0) as client:
        key = await key_with(database, "admin")
        headers = bearer(key) | {"X-Request-Id": "mine-1"}
        bodies: tuple[dict[str, Any], ...] = (_BOT, _BOT, {"chatbot": {}})
        for body in bodies:
            await client.put("/api/conversation-config/shop", json=body, headers=headers)
    (entry,) = await _entries(database)  # a second time nothing changes, and what is refused is not done
    assert (entry.actor, entry.action, entry.target) == (f"key:{key.split('_')[1]}", "chatbot.apply", "shop")
    assert (entry.detail, entry.request_id) == ("version 1", "mine-1")
    assert key not in str(entry)
    assert "canary" not in str(entry)


async def test_what_was_not_done_is_not_on_record_and_the_other_way_round(database: str) -> None:
    wanted = file.parse_one("shop", _BOT)
    connection = await asyncpg.connect(database)
    try:
        await chatbots.apply(connection, wanted, dry_run=True, actor=Actor("me"))
        await connection.execute("alter table audit rename to away")
        with pytest.raises(asyncpg.UndefinedTableError):
            await chatbots.apply(connection, wanted, actor=Actor("me"))
        await connection.execute("alter table away rename to audit")
        assert await connection.fetchval("select count(*) from chatbots") == 0
        assert await audit.last(connection, 10) == []
    finally:
        await connection.close()


async def test_commands_are_on_record_and_one_prints_it(database: str) -> None:
    (key,) = (await run("keys", "create", "shop", "--scope", "read", DATABASE_URL=database)).out
    key_id = key.split("_")[1]
    await run("keys", "revoke", key, DATABASE_URL=database)
    await run("keys", "revoke", "0" * 16, DATABASE_URL=database)
    await run("keys", "renew-signing", DATABASE_URL=database)
    entries = await _entries(database)
    assert [(entry.action, entry.target) for entry in entries] == [
        ("key.create", key_id),
        ("key.revoke", key_id),
        ("signing.renew", ""),
    ]
    assert all(entry.actor.startswith("command:") for entry in entries)
    printed = (await run("audit", "--last", "2", DATABASE_URL=database)).out
    assert ["signing.renew" in printed[0], f"key.revoke  {key_id}" in printed[1], len(printed)] == [True, True, 2]
    assert key not in "".join(printed) + str(entries)


async def test_it_goes_after_its_time(database: str) -> None:
    pool = await open_pool(database, 2)
    try:
        await pool.execute(
            "insert into audit (at, actor, action, target) values (now() - interval '3 days', 'a', 'b', 'c'),"
            " (now(), 'a', 'b', 'c')"
        )
        assert (await audit_expiring(2 * 86400).expired(pool, 10)).rows == 1
        assert await audit_expiring(2 * 86400).clean(pool, 10) == 1
        assert await pool.fetchval("select count(*) from audit") == 1
    finally:
        await pool.close()
