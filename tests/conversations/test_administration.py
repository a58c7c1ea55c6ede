"""The index as a whole over HTTP: who may, what is answered, and that one does it at a time."""

from random import Random

import asyncpg
import httpx2
import orjson

from app.access import keys
from app.access.audit import Actor
from app.conversations import upkeep
from app.conversations.index import Chat
from tests.access.users import as_user, serving_users
from tests.command import run
from tests.conversations.counted import agreed
from tests.conversations.savers import Saver
from tests.house import Open

_SSE = {"Accept": "text/event-stream"}


def _events(text: str) -> list[tuple[str, dict[str, object]]]:
    frames = [frame.split("\n") for frame in text.split("\n\n") if frame]
    return [(lines[0].removeprefix("event: "), orjson.loads(lines[1].removeprefix("data: "))) for lines in frames]


async def test_deleted_made_filled_and_rebuilt(house: Open) -> None:
    async with house(enable_background_jobs=False) as home:  # the job that compares would be sooner than the sync
        client, saver = home.client, Saver(home.database, Random(1))
        for number in range(5):
            await saver.save(Chat("ann", f"c{number}", "shop"))
        assert (await client.post("/api/sync/init")).json()["created"] is False
        assert (await client.request("DELETE", "/api/sync/index")).json()["deleted"] is True
        assert (await client.get("/api/sync/stats")).json()["indexExists"] is False
        for path in ("/api/messages/conversations", "/conversations"):
            refused = await client.get(path)
            assert (refused.status_code, refused.json()["code"]) == (409, "index_missing")
        assert (await client.post("/api/sync/sync")).json()["code"] == "index_missing"
        await saver.save(Chat("ann", "c0", "shop"))
        assert (await client.post("/api/sync/init")).json()["created"] is True
        synced = (await client.post("/api/sync/sync")).json()
        expected = {"success": True, "messagesProcessed": 12, "conversationsFound": 5, "conversationsIndexed": 5}
        assert synced.items() >= {**expected, "skipped": 0, "failed": []}.items()
        await agreed(home.database)
        stats = (await client.get("/api/sync/stats")).json()
        assert stats["lastSyncTime"] >= synced["syncStartTime"]
        assert (stats["conversationCount"], stats["sources"]) == (5, {"parley": 5})
        ids = await _ids(client)
        reset = (await client.post("/api/sync/reset")).json()
        assert reset["stats"]["conversationCount"] == 5
        assert await _ids(client) == ids
        events = _events((await client.post("/api/sync/reset", headers=_SSE)).text)
        assert [name for name, _ in events if name != "progress"] == ["result"]
        assert events[-1][1].keys() == {"message", "stats"}
        assert await home.count("audit") == 3


async def _ids(client: httpx2.AsyncClient) -> list[str]:
    page = (await client.get("/api/messages/conversations")).json()
    return [entry["conversationId"] for entry in page["conversations"]]


async def test_two_at_once_one_works_and_the_other_is_told(house: Open, database: str) -> None:
    async with house() as home:
        async with upkeep.alone(database):
            for method, path in (("POST", "sync"), ("POST", "reset"), ("DELETE", "index")):
                for headers in ({}, _SSE):
                    refused = await home.client.request(method, f"/api/sync/{path}", headers=headers)
                    assert (refused.status_code, refused.json()["code"]) == (409, "sync_running")
        assert (await home.client.post("/api/sync/sync")).status_code == 200


async def test_the_commands(database: str) -> None:
    connection = await asyncpg.connect(database)
    await Saver(connection, Random(1)).save(Chat("ann", "c1", "shop"))
    assert (await run("index", "sync", DATABASE_URL=database)).out == [
        "2 messages of 1 conversations counted; 0 put right."
    ]
    done = await run("index", "reset", DATABASE_URL=database)
    assert (done.code, done.out) == (0, ["Built anew: 1 conversations."])
    async with upkeep.alone(database) as own:
        refused = await run("index", "reset", DATABASE_URL=database)
        assert refused.code == 1
        assert "under way" in refused.err[-1]
        await upkeep.delete(own, Actor("command:test"))
    deleted = await run("index", "status", DATABASE_URL=database)
    assert deleted.code == 1
    assert deleted.out[0].startswith("0 conversations")
    await connection.close()


async def test_a_user_is_told_of_the_users_own_and_changes_nothing(database: str) -> None:
    connection = await asyncpg.connect(database)
    saver = Saver(connection, Random(1))
    for chat in (Chat("ann", "c1", "shop"), Chat("ann", "c2", "shop"), Chat("bob", "c3", "shop")):
        await saver.save(chat)
    async with serving_users(database) as client:
        stats = (await client.get("/api/sync/stats", headers=as_user("bob"))).json()
        assert (stats["indexExists"], stats["conversationCount"], stats["sources"]) == (True, 1, {})
        size = "select sum(pg_column_size(c.*)) from conversations c where username = 'bob'"
        assert stats["indexSize"] == await connection.fetchval(size)
        back_end = as_user(await keys.create(connection, "a back end", ["index"]))
        for name in ("username", "user_id"):
            named = await client.get("/api/sync/stats", params={name: "bob"}, headers=back_end)
            assert named.json() == stats, name
        assert (await client.get("/api/sync/stats", headers=back_end)).json()["conversationCount"] == 3
        theirs = await client.get("/api/sync/stats?username=ann", headers=as_user("bob"))
        assert (theirs.status_code, theirs.json()["code"]) == (403, "user_mismatch")
        two = await client.get("/api/sync/stats?username=ann&user_id=bob", headers=back_end)
        assert (two.status_code, two.json()["code"]) == (400, "bad_parameter")
        for method, path in (("POST", "init"), ("POST", "sync"), ("POST", "reset"), ("DELETE", "index")):
            refused = await client.request(method, f"/api/sync/{path}", headers=as_user("bob"))
            assert (refused.status_code, refused.json()["code"]) == (403, "scope_missing")
    await connection.close()
