"""The older surface: whole histories, directions and a status that the server keeps."""

from typing import Any

import httpx2
import pytest

from tests.access.users import as_user, serving_users
from tests.conversations.counted import agreed
from tests.house import House, Open
from tests.sync.test_gateway import Json, _ids, add, delete, put, sync

_AT = "2024-01-01T12:00:{:02}.{:03}Z"


def said(name: str, content: str = "Hello", at: int = 0, **fields: Any) -> Json:
    role = "assistant" if at % 2 else "user"
    return {"id": name, "role": role, "content": content, "timestamp": _AT.format(at // 1000, at % 1000), **fields}


def talk(name: str, *messages: Json, title: str = "Trip", at: int = 0, **fields: Any) -> Json:
    times = {"createdAt": _AT.format(0, 0), "updatedAt": _AT.format(at // 1000, at % 1000)}
    return {"id": name, "title": title, **times, "messages": list(messages), **fields}


async def send(home: House, *conversations: Json, user: str = "ann", **fields: Any) -> Json:
    body = {"conversations": list(conversations), "user_id": user, **fields}
    response = await home.client.post("/api/chat/sync", json=body)
    assert response.status_code == 200, response.text
    told: Json = response.json()
    return told


async def read(home: House, since: str = "") -> Json:
    response = await home.client.get("/api/chat/sync", params={"user_id": "ann", "since": since})
    assert response.status_code == 200, response.text
    told: Json = response.json()
    return told


# -- whole histories


async def test_a_history_of_ten_thousand_messages_twice_moves_no_usage_and_writes_nothing_the_second_time(
    house: Open,
) -> None:
    async with house() as home:
        await home.ask(session_id="run")
        usage = (await home.client.get("/api/usage", params={"user_id": "ann"})).json()
        assert usage["usage"][0]["calls"] == 1
        history = [talk(f"c{n}", *(said(f"m{n}-{m}", f"Word {m}", m) for m in range(1_000))) for n in range(10)]
        first = await send(home, *history)
        assert (first["conversations"], first["messages"], first["skippedFailed"]) == (10, 10_000, 0)
        tables = ("chats", "messages", "sync_head", "conversations", "conversation_days", "chat_versions")
        before = {
            table: await home.database.fetch(f"select *, xmin::text, ctid::text from {table}") for table in tables
        }
        assert await send(home, *history) | {"syncedAt": ""} == first | {"syncedAt": ""}
        for table, rows in before.items():
            assert await home.database.fetch(f"select *, xmin::text, ctid::text from {table}") == rows, table
        assert await home.count("messages") == 10_002
        assert (await home.client.get("/api/usage", params={"user_id": "ann"})).json() == usage
        assert await home.count("usage_ledger") == 1
        assert len(await agreed(home.database)) == 11


async def test_what_is_new_in_a_history_reaches_devices_and_the_rest_stays(house: Open) -> None:
    async with house() as home:
        await send(home, talk("c", said("m"), said("n", "Hi", 1)))
        desk = await sync(home.client, "desk")
        await send(home, talk("c", said("m"), said("n", "Hi", 1), said("o", "More", 2), title="Journey", at=5))
        told = await sync(home.client, "desk", cursor=desk["cursor"])
        assert (_ids(told), told["chats"][0]["title"]) == (({"c"}, {"o"}), "Journey")
        seq = await home.database.fetchval("select seq from sync_head")
        await send(home, talk("c", said("m")), talk("c", title="Trip"))
        assert await home.database.fetchval("select seq from sync_head") == seq, "an old copy is no word"
        rows = await agreed(home.database)
        assert [(row["count"], row["first_message_at"].year) for row in rows] == [(3, 2024)]
        order = [row["id"] for row in await home.database.fetch("select id from messages order by position")]
        assert order == ["m", "n", "o"]


async def test_failed_messages_are_left_out_unless_they_are_asked_for(house: Open) -> None:
    async with house() as home:
        history = talk("c", said("m"), said("bad", "", 2, error=True), said("fine", "Ok", 3, error=False))
        told = await send(home, history)
        assert (told["messages"], told["skippedFailed"]) == (2, 1)
        assert (await send(home, history, includeFailed=True))["skippedFailed"] == 0
        rows = await home.database.fetch("select status from messages order by position")
        assert [row["status"] for row in rows] == ["complete", "complete", "failed"]
        assert [row["count"] for row in await agreed(home.database)] == [2]
        await send(home, talk("c", said("bad", "At last", 2)))
        assert [row["count"] for row in await agreed(home.database)] == [3]


async def test_ids_that_are_counted_anew_in_each_conversation_are_different_messages(house: Open) -> None:
    async with house() as home:
        history = [talk(f"c{n}", said("1"), said("2", f"Answer {n % 2}", 1)) for n in range(4)]
        await send(home, *history)
        assert [row["count"] for row in await agreed(home.database)] == [2, 2, 2, 2]
        await send(home, *reversed(history))
        assert await home.count("messages") == 8


async def test_an_old_copy_brings_nothing_back(house: Open) -> None:
    async with house() as home:
        await send(home, talk("c", said("m"), said("n", "Hi", 1)))
        await sync(home.client, "phone", [{"op": "msg.del", "id": "n"}], [delete("c", 1 << 37)])
        for purged in (False, True):
            if purged:
                await home.database.execute("delete from messages")
                await home.database.execute("update chats set is_purged = true, title = ''")
            await send(home, talk("c", said("m"), said("n", "Hi", 1), said("late", "Late", 2), title="Other", at=9))
            assert await agreed(home.database) == []
            assert await home.count("chats") == 1
        assert await home.count("messages") == 0


async def test_what_changed_is_told_whole_and_what_was_deleted_by_name(house: Open) -> None:
    async with house() as home:
        history = [talk("c", said("m"), said("n", "Hi", 1)), talk("d", said("o"), title="Shoes")]
        await send(home, *history, talk("gone"))
        first = await read(home)
        assert first["conversations"] == [{**one, "updatedAt": one["messages"][-1]["timestamp"]} for one in history] + [
            talk("gone")
        ]
        await send(home, *first["conversations"])
        await home.database.execute("update messages set updated_at = now() - interval '1 hour'")
        await home.database.execute("update chats set updated_at = now() - interval '1 hour'")
        assert (await read(home, first["syncedAt"]))["conversations"] == []
        await send(home, talk("d", said("p", "New", 2)))
        await sync(home.client, "phone", [delete("gone", 1 << 37)])
        told = await read(home, first["syncedAt"])
        assert [[one["id"] for one in chat["messages"]] for chat in told["conversations"]] == [["o", "p"]]
        assert told["deleted"] == ["gone"]
        assert (await read(home))["deleted"] == []


_BAD: list[tuple[Any, int, str]] = [
    ({"conversations": None}, 422, "invalid_request"),
    ({"conversations": [1]}, 422, "invalid_request"),
    ({"conversations": [talk("c/../d")]}, 422, "invalid_request"),
    ({"conversations": [talk("c", title="x" * 501)]}, 422, "invalid_request"),
    ({"conversations": [talk("c", said("m", role="system"))]}, 422, "invalid_request"),
    ({"conversations": [talk("c", {**said("m"), "content": 7})]}, 422, "invalid_request"),
    ({"conversations": [talk("c", said("m", "é" * (1 << 19) + "x"))]}, 422, "invalid_request"),
    ({"conversations": [talk("c", said("m", timestamp="soon"))]}, 422, "invalid_request"),
    ({"conversations": [talk("c", said("m", timestamp=-1))]}, 422, "invalid_request"),
    ({"conversations": [talk("c", said("m", timestamp=10**30))]}, 422, "invalid_request"),
    ({"conversations": [talk("c", said("m", timestamp=True))]}, 422, "invalid_request"),
    ({"conversations": [talk("c", updatedAt="9999-12-31T23:59:59-14:00")]}, 422, "invalid_request"),
    ({"conversations": [talk("c") for _ in range(10_001)]}, 422, "invalid_request"),
    ({"conversations": [], "user_id": None}, 422, "invalid_request"),
    ({"client": "c", "push": [], "x": "y" * (1 << 20)}, 413, "body_too_large"),
]


async def test_bad_histories_are_refused_and_change_nothing(house: Open) -> None:
    async with house() as home:
        for body, status, code in _BAD:
            response = await home.client.post("/api/chat/sync", json={"user_id": "ann", **body})
            assert (response.status_code, response.json()["code"]) == (status, code), str(body)[:200]
        short = {"id": "m", "role": "user", "content": "", "timestamp": 0}
        many = {"conversations": [talk("c", *([short] * 20_001))], "user_id": "ann"}
        assert (await home.client.post("/api/chat/sync", json=many)).status_code == 422
        for since in ("soon", "-1", "2024-13-01", "\0", "9" * 5_000):
            response = await home.client.get("/api/chat/sync", params={"user_id": "ann", "since": since})
            assert (response.status_code, response.json()["code"]) == (400, "bad_parameter"), since
        assert await home.count("chats") == 0


async def test_a_history_beyond_its_limit_is_refused_before_it_is_read(house: Open) -> None:
    async with house(sync_history_limit=2 << 20) as home:
        fits = talk("c", *(said(f"m{n}", "x" * 1_000, n) for n in range(1_500)))
        assert (await send(home, fits))["messages"] == 1_500
        response = await home.client.post("/api/chat/sync", content=b'{"conversations":[' + b" " * (2 << 20) + b"]}")
        assert (response.status_code, response.json()["code"]) == (413, "body_too_large")


async def test_what_cannot_be_stored_is_replaced_and_is_not_new_the_second_time(house: Open) -> None:
    async with house() as home:
        body = b'{"user_id":"ann","conversations":[{"id":"c","title":"A\\u0000","messages":[{"id":"m","role":"user",'
        body += b'"content":"\\ud83d\\r\\n","timestamp":1700000000000}]}]}'
        for _ in range(2):
            assert (await home.client.post("/api/chat/sync", content=body)).status_code == 200
        assert await home.database.fetchval("select content from messages") == "\ufffd\r\n"
        assert await home.database.fetchval("select seq from sync_head") == 1


# -- directions


async def _now(client: httpx2.AsyncClient, direction: str, **fields: Any) -> Json:
    response = await client.post("/api/sync", json={"direction": direction, "user_id": "ann", **fields})
    assert response.status_code == 200, response.text
    told: Json = response.json()
    return told


async def _status(client: httpx2.AsyncClient, device: str | None = None) -> Json:
    params = {"user_id": "ann"} | ({"device_id": device} if device else {})
    response = await client.get("/api/sync", params=params)
    assert response.status_code == 200, response.text
    told: Json = response.json()
    return told


async def test_a_bare_full_sync_is_that_of_the_servers_device(house: Open) -> None:
    async with house(device_id="kiosk") as home:
        assert await _status(home.client) | {"serverTime": ""} == {
            "lastSyncTimestamp": None,
            "pendingChanges": 0,
            "isOnline": True,
            "deviceId": "kiosk",
            "serverTime": "",
            "cursor": None,
        }
        await sync(home.client, "phone", [put("c"), add("m")])
        assert (await _status(home.client))["pendingChanges"] == 2
        done = await _now(home.client, "full")
        assert (_ids(done["result"]), done["status"]["deviceId"]) == (({"c"}, {"m"}), "kiosk")
        assert (done["status"]["cursor"], done["status"]["pendingChanges"]) == (done["result"]["cursor"], 0)
        assert (await _status(home.client))["lastSyncTimestamp"] is not None
        assert (await _status(home.client))["cursor"] is None, "it has not shown that it has it"
        again = await _now(home.client, "full", cursor=done["result"]["cursor"])
        assert _ids(again["result"]) == (set(), set())
        assert (await _status(home.client))["cursor"] == done["result"]["cursor"]
        written = await home.database.fetchval("select xmin::text from sync_head")
        await _now(home.client, "full", cursor=done["result"]["cursor"])
        assert await home.database.fetchval("select xmin::text from sync_head") == written


async def test_up_and_down_are_halves_of_an_exchange(house: Open) -> None:
    async with house() as home:
        await sync(home.client, "phone", [put("theirs"), add("m", "theirs")])
        push = [{"mid": 1, "ops": [put("mine"), add("n", "mine")]}]
        down = await _now(home.client, "download", device_id="desk", push=push)
        assert (_ids(down["result"]), down["result"]["acked"]) == (({"theirs"}, {"m"}), 0)
        up = await _now(home.client, "upload", device_id="desk", push=push, cursor=down["result"]["cursor"])
        assert (_ids(up["result"]), up["result"]["acked"]) == ((set(), set()), 1)
        assert up["result"]["cursor"] == down["result"]["cursor"]
        await sync(home.client, "phone", [put("mine", "Taken", at=9)], first=2)
        lost = [{"mid": 2, "ops": [put("mine", "Late", at=5)]}]
        told = await _now(home.client, "upload", device_id="desk", push=lost, cursor=up["result"]["cursor"])
        assert [chat["title"] for chat in told["result"]["chats"]] == ["Taken"], "what became of it is told at once"
        assert (await _status(home.client, "desk"))["pendingChanges"] == 1
        rest = await _now(home.client, "download", device_id="desk", cursor=up["result"]["cursor"])
        assert _ids(rest["result"]) == ({"mine"}, set())
        fresh = await _now(home.client, "upload", device_id="new")
        assert (fresh["result"]["cursor"], fresh["result"]["chats"], fresh["status"]["cursor"]) == (None, [], None)
        assert await home.database.fetchval("select count(*) from sync_status") == 3


async def test_bad_directions_are_refused(house: Open) -> None:
    async with house() as home:
        for body in ({}, {"direction": "sideways"}, {"direction": "full", "device_id": "a b"}, {"direction": 1}):
            response = await home.client.post("/api/sync", json={"user_id": "ann", **body})
            assert (response.status_code, response.json()["code"]) == (422, "invalid_request"), body
        for device in ("a b", "x" * 129, "\0", "../x"):
            response = await home.client.get("/api/sync", params={"user_id": "ann", "device_id": device})
            assert (response.status_code, response.json()["code"]) == (422, "invalid_request"), device
        assert await home.count("sync_head") == 0


@pytest.mark.parametrize(("method", "path"), [("GET", "/api/sync"), ("POST", "/api/sync"), ("GET", "/api/chat/sync")])
async def test_switched_off_all_of_it_says_so(house: Open, method: str, path: str) -> None:
    async with house(sync_enabled=False) as home:
        response = await home.client.request(
            method, path, params={"user_id": "ann", "since": ""}, json={"direction": "full"}
        )
        assert (response.status_code, response.json()["code"]) == (403, "sync_disabled")


async def test_another_users_histories_and_devices_are_unknown(database: str) -> None:
    async with serving_users(database) as client:
        hers, his = as_user("ann"), as_user("bob")
        body = {"conversations": [talk("c", said("m", "The secret of ann"))]}
        assert (await client.post("/api/chat/sync", json=body, headers=hers)).status_code == 200
        done = await client.post("/api/sync", json={"direction": "full", "device_id": "phone"}, headers=hers)
        cursor = done.json()["result"]["cursor"]
        other = {"conversations": [talk("c", said("m", "Mine"), title="Mine")]}
        taken = (await client.post("/api/chat/sync", json=other, headers=his)).json()
        assert (taken["messages"], taken["skippedFailed"]) == (1, 0)
        told = await client.get("/api/chat/sync", params={"since": ""}, headers=his)
        assert [one["title"] for one in told.json()["conversations"]] == ["Mine"]
        mine = (await client.get("/api/sync", params={"device_id": "phone"}, headers=his)).json()
        assert (mine["lastSyncTimestamp"], mine["pendingChanges"]) == (None, 2)
        again = {"direction": "full", "device_id": "phone", "cursor": cursor}
        assert (await client.post("/api/sync", json=again, headers=his)).json()["result"]["resync"] == "epoch"
        for response in (
            await client.get("/api/sync", params={"user_id": "ann"}, headers=his),
            await client.get("/api/chat/sync", params={"user_id": "ann", "since": ""}, headers=his),
            await client.post("/api/sync", json={"direction": "full", "user_id": "ann"}, headers=his),
            await client.post("/api/chat/sync", json={**body, "user_id": "ann"}, headers=his),
        ):
            assert (response.status_code, response.json()["code"]) == (403, "user_mismatch")
