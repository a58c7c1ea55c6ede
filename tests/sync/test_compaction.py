"""Deleted chats become empty after their time, and failed messages go: what devices are told, and what stays."""

import asyncio
from datetime import UTC, datetime
from typing import Any

import asyncpg
import pytest

from app.postgres import open_pool
from app.sync.compaction import _DUE_CHATS, _DUE_FAILED, DeletedChats, FailedMessages
from app.sync.merge import successor
from tests.conversations.counted import agreed
from tests.house import House, Open
from tests.sync.test_gateway import _ids, add, delete, put, sync

_DAY_S = 86400.0
_CHATS, _FAILED = DeletedChats(90 * _DAY_S), FailedMessages(90 * _DAY_S)
# The house cleans up as well, and nothing of this.
_LATER: dict[str, Any] = {"keep_deleted_days": 3650, "keep_failed_days": 3650}
_AGED = "update {} set updated_at = now() - interval '91 days'"


async def _clean(dsn: str, what: DeletedChats | FailedMessages = _CHATS) -> int:
    pool = await open_pool(dsn, 1)
    try:
        return await what.clean(pool, 5_000)
    finally:
        await pool.close()


async def _rows(home: House, query: str) -> list[dict[str, Any]]:
    return [dict(row) for row in await home.database.fetch(query)]


async def test_a_deleted_chat_becomes_an_empty_final_row(house: Open, database: str) -> None:
    async with house(**_LATER) as home:
        old = await sync(home.client, "desk", [put("kept"), add("k", "kept", "Stays")])
        await sync(home.client, "phone", [put("c", "Old")], [put("c", "Secret", 1), add("m")])
        await sync(home.client, "desk", [put("c", "Other", 2)], first=2)
        gone = await sync(home.client, "phone", [delete("c", 3)], first=3)
        assert await home.count("chat_versions") > 0
        assert await _clean(database) == 0, "not yet"
        await home.database.execute(_AGED.format("chats"))
        days = await _rows(home, "select * from conversation_days")
        assert await _clean(database) == 2
        assert await _clean(database) == 0
        (row,) = await _rows(home, "select title, is_deleted, is_purged, is_emptied from chats where id = 'c'")
        assert list(row.values()) == ["", True, True, True]
        assert [row["id"] for row in await home.database.fetch("select id from messages")] == ["k"]
        assert await home.count("chat_versions") == 0
        assert await _rows(home, "select * from conversation_days") == days
        assert [row["conversation_id"] for row in await agreed(home.database)] == ["kept"]
        told = await sync(home.client, "phone", cursor=gone["cursor"])
        assert (_ids(told), told["chats"][0]["is_purged"], told.get("bootstrap")) == (({"c"}, set()), True, None)
        away = await sync(home.client, "desk", cursor=old["cursor"])
        assert (away["resync"], away["bootstrap"], _ids(away)) == ("compacted", True, ({"c", "kept"}, {"k"}))
        late = await sync(home.client, "phone", [add("n", at=9)], [put("c", "Back", 9)], first=4)
        assert [op["status"] for result in late["results"] for op in result["ops"]] == ["moved", "lost"]
        assert [one["chat_id"] for one in late["messages"] if one["id"] == "n"] == [successor("c")]
        assert await home.count("usage_ledger") == 0


async def test_a_question_opens_it_anew_and_devices_begin_anew(house: Open, database: str) -> None:
    async with house(**_LATER) as home:
        await sync(home.client, "phone", [put("c", "Old"), add("m"), add("n", content="More")])
        gone = await sync(home.client, "phone", [delete("c", 3)], first=2)
        await home.database.execute(_AGED.format("chats"))
        some = DeletedChats(90 * _DAY_S, piece=1)
        assert await _clean(database, some) == 2, "half of it"
        told = await sync(home.client, "phone", cursor=gone["cursor"])
        await home.ask(session_id="c", client_message_id="q", message_text="Again?")
        assert await _clean(database, some) == 0
        answer = await sync(home.client, "phone", cursor=told["cursor"])
        assert (answer["resync"], answer["chats"][0]["title"]) == ("compacted", "Again?")
        assert {one["content"] for one in answer["messages"]} >= {"Again?"}
        assert not {one["content"] for one in answer["messages"]} & {"Hello", "More"}
        counted = await _rows(home, "select message_count, first_question from conversations")
        assert counted == [{"message_count": 2, "first_question": "Again?"}]


async def test_it_goes_a_piece_at_a_time_and_waits_for_nobody(house: Open, database: str) -> None:
    async with house(**_LATER) as home:
        for user in ("ann", "bob"):
            ops = [[put(f"c{n}"), *(add(f"m{n}-{m}", f"c{n}") for m in range(9)), delete(f"c{n}", 1)] for n in range(4)]
            await sync(home.client, "phone", *ops, user=user)
        await home.database.execute(_AGED.format("chats"))
        some = DeletedChats(90 * _DAY_S, piece=10)
        other = await asyncpg.connect(database)
        async with other.transaction():
            await other.execute("select from sync_head where user_id = 'bob' for update")
            assert await _clean(database, some) == 4 + 10
        await other.close()
        done = 0
        while piece := sum(await asyncio.gather(*(_clean(database, some) for _ in range(3)))):
            done += piece
        assert done == 26 + 4 + 36, "each row once, whoever does it"
        assert await home.count("messages") == 0
        assert await home.database.fetchval("select count(*) from chats where is_purged and is_emptied") == 8


async def test_a_user_without_a_counter_gets_none_by_it(house: Open, database: str) -> None:
    async with house(**_LATER) as home:
        for user in ("", "erin"):
            await home.database.execute(
                "insert into chats (user_id, id, title, is_deleted, updated_at) values ($1, 'c', 'Secret', true, $2)",
                *(user, datetime(2020, 1, 1, tzinfo=UTC)),
            )
        assert await _clean(database) == 2
        assert await home.database.fetchval("select count(*) from chats where is_emptied and title = ''") == 2
        assert await home.count("sync_head") == 0


async def test_failed_messages_go_and_may_still_become_complete(house: Open, database: str) -> None:
    async with house(**_LATER) as home:
        failed = [put("c"), add("m", content="", status="failed"), add("n", content="", status="failed"), add("o")]
        asks = await sync(home.client, "phone", failed, failed=True)
        await sync(home.client, "phone", [{"op": "msg.del", "id": "n"}], first=2, failed=True)
        desk = await sync(home.client, "desk")
        await home.database.execute(_AGED.format("messages"))
        before = await agreed(home.database)
        assert [await _clean(database, _FAILED) for _ in range(2)] == [1, 0]
        assert await agreed(home.database) == before
        assert [row["id"] for row in await home.database.fetch("select id from messages order by id")] == ["n", "o"]
        told = await sync(home.client, "desk", cursor=desk["cursor"])
        assert (told["messages"], told.get("bootstrap")) == ([], None), "it never had them"
        anew = await sync(home.client, "phone", cursor=asks["cursor"], failed=True)
        assert (anew["resync"], _ids(anew)[1]) == ("compacted", {"n", "o"})
        assert "bootstrap" not in await sync(home.client, "phone", cursor=anew["cursor"], failed=True)
        await sync(home.client, "phone", [add("m", content="At last")], first=3)
        assert [one["content"] for one in (await sync(home.client, "desk", cursor=told["cursor"]))["messages"]] == [
            "At last"
        ]


@pytest.mark.parametrize(("query", "index"), [(_DUE_CHATS, "chats_deleted"), (_DUE_FAILED, "messages_failed")])
async def test_what_is_due_is_found_by_an_index(database: str, query: str, index: str) -> None:
    connection = await asyncpg.connect(database)
    async with connection.transaction():
        for way in ("seqscan", "bitmapscan"):
            await connection.execute(f"set local enable_{way} = off")
        plan = [row[0] for row in await connection.fetch(f"explain (costs off) {query}", 1.0, 10)]
    await connection.close()
    assert any(f"Index Scan using {index}" in line for line in plan), "\n".join(plan)
    assert not any("Sort Key: " in line and "updated_at" in line for line in plan), "\n".join(plan)
