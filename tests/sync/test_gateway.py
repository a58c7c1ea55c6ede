"""Synchronising through a real gateway: what is answered, and what the gateway's own writes have to do with it."""

import asyncio
import json
from datetime import UTC, datetime
from typing import Any

import asyncpg
import httpx2

from app.access import keys
from app.sync.devices import MOST_CLIENTS, remember
from app.sync.exchange import Asked, Head, Mutation
from app.sync.merge import AddMessage, fork, stamp_at
from tests.access.users import as_user, serving_users
from tests.conversations.counted import agreed
from tests.house import Open

Json = dict[str, Any]
_NOW = 1_700_000_000_000


def put(chat: str, title: str = "Trip", at: int = 0, **fields: Any) -> Json:
    return {"op": "chat.put", "id": chat, "title": title, "stamp": stamp_at(_NOW + at), **fields}


def add(message: str, chat: str = "c", content: str = "Hello", at: int = 0, **fields: Any) -> Json:
    given = {"op": "msg.add", "id": message, "chat_id": chat, "role": "user", "content": content}
    return {**given, "stamp": stamp_at(_NOW + at), **fields}


def delete(chat: str, at: int) -> Json:
    return {"op": "chat.del", "id": chat, "stamp": stamp_at(_NOW + at)}


async def sync(
    client: httpx2.AsyncClient,
    device: str = "phone",
    *mutations: list[Json],
    first: int = 1,
    cursor: str | None = None,
    user: str = "ann",
    **more: Any,
) -> Json:
    push = [{"mid": first + n, "ops": ops} for n, ops in enumerate(mutations)]
    body = {"client": device, "cursor": cursor, "push": push, "user_id": user, **more}
    response = await client.post("/api/chat/sync", json=body)
    assert response.status_code == 200, response.text
    answer: Json = response.json()
    return answer


def _ids(answer: Json) -> tuple[set[str], set[str]]:
    return {chat["id"] for chat in answer["chats"]}, {message["id"] for message in answer["messages"]}


async def test_what_one_device_does_the_other_sees_once(house: Open) -> None:
    async with house() as home:
        pushed = await sync(home.client, "phone", [put("c"), add("m")])
        assert (pushed["acked"], pushed["more"], pushed["bootstrap"]) == (1, False, True)
        seen = await sync(home.client, "desk")
        assert _ids(seen) == ({"c"}, {"m"})
        assert seen["messages"][0]["content"] == "Hello"
        again = await sync(home.client, "desk", cursor=seen["cursor"])
        assert (again["chats"], again["messages"], again["cursor"]) == ([], [], seen["cursor"])
        own = await sync(home.client, "phone", [add("n", at=1)], first=2, cursor=pushed["cursor"])
        assert (own["chats"], own["messages"]) == ([], []), "as it was said"
        rows = await agreed(home.database)
        assert [(row["conversation_id"], row["count"], row["first_question"]) for row in rows] == [("c", 2, "Hello")]
        assert await home.count("usage_ledger") == 0


async def test_nothing_new_costs_little_and_writes_nothing(house: Open) -> None:
    async with house() as home:
        pushed = await sync(home.client, "phone", [put("c"), add("m")])
        body = b'{"client":"phone","cursor":"%s","user_id":"ann"}' % pushed["cursor"].encode()
        written = await home.database.fetchval("select xmin::text from sync_head")
        answer = await home.client.post("/api/chat/sync", content=body)
        assert answer.json()["messages"] == []
        assert len(body) + len(answer.content) <= 200
        assert await home.database.fetchval("select xmin::text from sync_head") == written


async def test_a_push_repeated_is_told_what_is_there_and_changes_nothing(house: Open) -> None:
    async with house() as home:
        first = await sync(home.client, "phone", [put("c"), add("m")], [add("m", content="Other")])
        forked = fork_of("m", "Other")
        assert first["results"] == [{"mid": 2, "ops": [{"id": "m", "status": "forked"}]}]
        assert forked in _ids(first)[1]
        before = await home.database.fetch("select * from messages order by id")
        for _ in range(3):
            again = await sync(
                home.client, "phone", [put("c"), add("m")], [add("m", content="Other")], cursor=first["cursor"]
            )
            assert (again["acked"], again["results"]) == (2, first["results"])
            assert _ids(again) == ({"c"}, {"m"})
        assert await home.database.fetch("select * from messages order by id") == before
        assert len(await agreed(home.database)) == 1


def fork_of(message: str, content: str) -> str:
    return fork(AddMessage(message, "c", "user", content, stamp_at(0)))


_BAD: list[tuple[Json, int, str]] = [
    ({"push": [{"mid": 2, "ops": []}]}, 409, "unknown_client"),
    ({"client": "known", "push": [{"mid": 3, "ops": []}]}, 409, "gap"),
    ({"cursor": "x"}, 400, "bad_cursor"),
    ({"cursor": "5b6f1f0a6a55.-1"}, 400, "bad_cursor"),
    ({"push": [{"mid": 1, "ops": [{"op": "chat.burn", "id": "c"}]}]}, 422, "invalid_request"),
    ({"push": [{"mid": 1, "ops": [put("c/../d")]}]}, 422, "invalid_request"),
    ({"push": [{"mid": 1, "ops": [put("c", stamp="soon")]}]}, 422, "invalid_request"),
    ({"push": [{"mid": 1, "ops": [put("c", "x" * 501)]}]}, 422, "invalid_request"),
    ({"push": [{"mid": 1, "ops": [{"op": "msg.del", "id": "m"}] * 101}]}, 422, "invalid_request"),
    ({"push": [{"mid": 1, "ops": []}, {"mid": 3, "ops": []}]}, 422, "invalid_request"),
    ({"push": [{"mid": 1, "ops": [add("m", content="x" * (1 << 20))]}]}, 413, "body_too_large"),
    ({"push": [{"mid": 1, "ops": [{**add("m"), "role": "system"}]}]}, 422, "invalid_request"),
    ({"user_id": None}, 422, "invalid_request"),
]


async def test_bad_exchanges_are_refused_and_change_nothing(house: Open) -> None:
    async with house() as home:
        await sync(home.client, "known", [put("c")])
        head = await home.database.fetchrow("select * from sync_head")
        for body, status, code in _BAD:
            response = await home.client.post("/api/chat/sync", json={"client": "new", "user_id": "ann", **body})
            assert (response.status_code, response.json()["code"]) == (status, code), body
            if code == "gap":
                assert response.json()["expected"] == 2
        # Written as JSON again these are longer than they were.
        ops = [{**add("m"), "attachments": [{"n": ["short"] * 100_000}]}]
        body = {"client": "new", "user_id": "ann", "push": [{"mid": 1, "ops": ops}]}
        longer = await home.client.post("/api/chat/sync", content=json.dumps(body).replace('"short"', "1e15"))
        assert (longer.status_code, longer.json()["code"]) == (422, "invalid_request")
        other = await home.client.post(
            "/api/chat/sync", params={"user_id": "ann"}, json={"client": "new", "user_id": "bob"}
        )
        assert (other.status_code, other.json()["code"]) == (422, "invalid_request")
        assert await home.database.fetchrow("select * from sync_head") == head


async def test_a_cursor_of_somebody_else_of_the_future_and_of_before_begins_anew(house: Open) -> None:
    async with house() as home:
        mine = (await sync(home.client, "phone", [put("c")]))["cursor"]
        theirs = (await sync(home.client, "phone", [put("d")], user="bob"))["cursor"]
        epoch, _, seq = mine.partition(".")
        for cursor, why in ((theirs, "epoch"), (f"{epoch}.{int(seq) + 9}", "ahead")):
            answer = await sync(home.client, "desk", [put(f"by-{why}", at=1)], cursor=cursor)
            assert (answer["resync"], answer["bootstrap"], answer["acked"]) == (why, True, 1), "applied all the same"
            assert {"c", f"by-{why}"} <= _ids(answer)[0]
            assert "d" not in _ids(answer)[0]
            await home.database.execute("update sync_head set clients = '{}'")
        await home.database.execute("update sync_head set gc_seq = 2 where user_id = 'ann'")
        assert (await sync(home.client, "desk", cursor=mine))["resync"] == "compacted"
        got = await home.client.get("/api/chat/sync", params={"user_id": "ann"})
        assert got.json()["bootstrap"]


async def test_a_restored_backup_gets_a_new_epoch_and_devices_recover(house: Open) -> None:
    async with house() as home:
        first = await sync(home.client, "phone", [put("c"), add("m")], [add("n", at=1)])
        await home.database.execute("update messages set seq = 0, is_deleted = true, content = '' where id = 'n'")
        await home.database.execute("update sync_head set seq = 1, epoch = 'aaaaaaaaaaaa', clients = '{}'")
        answer = await sync(home.client, "phone", cursor=first["cursor"])
        assert (answer["resync"], answer["bootstrap"], answer["acked"]) == ("epoch", True, 0)
        body = {"client": "phone", "user_id": "ann", "push": [{"mid": 3, "ops": [add("o")]}]}
        assert (await home.client.post("/api/chat/sync", json=body)).json()["code"] == "unknown_client"
        assert (await sync(home.client, "phone-2", [add("o")]))["acked"] == 1


async def test_titles_deletions_and_what_comes_back(house: Open) -> None:
    async with house() as home:
        client = home.client
        await sync(client, "phone", [put("c", "Old"), add("m")])
        desk = await sync(client, "desk", [put("c", "New", at=5)])
        lost = await sync(client, "phone", [put("c", "Older", at=4)], first=2)
        assert lost["results"] == [{"mid": 2, "ops": [{"id": "c", "status": "lost"}]}]
        assert lost["chats"][0]["title"] == "New"
        kept = await home.database.fetch("select title from chat_versions order by title")
        assert [row["title"] for row in kept] == ["Old", "Older"]
        gone = await sync(client, "phone", [delete("c", 6)], first=3, cursor=lost["cursor"])
        assert (await agreed(home.database)) == []
        seen = await sync(client, "desk", cursor=desk["cursor"])
        assert seen["chats"][0]["is_deleted"]
        await sync(client, "desk", [add("o", at=5, content="Older")], first=2, cursor=seen["cursor"])
        assert (await agreed(home.database)) == [], "an older message does not bring it back"
        back = await sync(client, "desk", [add("n", at=7)], first=3)
        assert "is_deleted" not in back["chats"][0]
        assert [row["count"] for row in await agreed(home.database)] == [3]
        told = await sync(client, "phone", [{"op": "msg.del", "id": "m"}], first=4, cursor=gone["cursor"])
        assert _ids(told) == ({"c"}, {"n", "o"})
        assert [(row["count"], row["first_question"]) for row in await agreed(home.database)] == [(2, "Older")]


async def test_a_clock_far_ahead_is_not_believed_and_its_device_is_told(house: Open) -> None:
    async with house() as home:
        ahead = 1 << 43
        answer = await sync(home.client, "phone", [put("c", at=ahead), add("m", at=ahead)])
        assert answer["chats"][0]["stamp"][:12] == f"{answer['server_time']:012x}"
        assert answer["messages"][0]["stamp"] > answer["chats"][0]["stamp"]


async def test_failed_messages_come_and_go_only_where_asked(house: Open) -> None:
    async with house() as home:
        failed = add("m", content="", status="failed")
        assert _ids(await sync(home.client, "phone", [put("c"), failed])) == ({"c"}, set())
        assert await home.count("messages") == 0
        told = await sync(home.client, "phone", [failed], first=2, failed=True)
        desk = await sync(home.client, "desk")
        assert _ids(desk)[1] == set()
        wants = await sync(home.client, "desk", failed=True, cursor=desk["cursor"])
        assert (_ids(wants)[1], wants["bootstrap"]) == ({"m"}, True)
        assert await agreed(home.database) == []
        await sync(home.client, "phone", [add("m", at=1)], first=3, cursor=told["cursor"], failed=True)
        assert (await sync(home.client, "desk", cursor=desk["cursor"]))["messages"][0]["content"] == "Hello"
        assert [row["count"] for row in await agreed(home.database)] == [1]


async def test_pages_are_cut_between_mutations_and_hold_own_rows_once(house: Open) -> None:
    async with house() as home:
        ops = [[put(f"c{n}"), *(add(f"m{n}-{m}", f"c{n}") for m in range(99))] for n in range(12)]
        for start in (0, 6):
            await sync(home.client, "phone", *ops[start : start + 6], first=start + 1)
        answer = await sync(home.client, "phone")
        seen: list[tuple[set[str], set[str]]] = [_ids(answer)]
        while answer["more"]:
            assert sum(map(len, _ids(answer))) == 500
            answer = await sync(home.client, "phone", cursor=answer["cursor"])
            seen.append(_ids(answer))
        assert [len(chats) for chats, _ in seen] == [5, 5, 2]
        assert len(set().union(*(messages for _, messages in seen))) == 12 * 99
        assert _ids(await sync(home.client, "phone", cursor=answer["cursor"])) == (set(), set())


# -- what the gateway writes


async def test_what_the_gateway_saves_reaches_devices_under_their_ids(house: Open) -> None:
    async with house() as home:
        before = await sync(home.client, "phone", [put("s1", "My title")])
        await home.ask(session_id="s1", client_message_id="q1", message_text="What?")
        answer = await sync(home.client, "phone", cursor=before["cursor"])
        question, reply = sorted(answer["messages"], key=lambda one: one["stamp"])
        assert (question["id"], question["content"], reply["role"]) == ("q1", "What?", "assistant")
        assert (answer["chats"], reply["chat_id"]) == ([], "s1"), "the chat is as it was"
        await sync(home.client, "phone", [delete("s1", 9)], first=2)
        await home.ask(session_id="s1")
        assert "is_deleted" not in (await sync(home.client, "desk"))["chats"][0]
        await agreed(home.database)


async def test_a_question_that_a_device_brought_before_is_asked_once(house: Open) -> None:
    async with house() as home:
        await sync(home.client, "phone", [put("s1"), add("q1", "s1", "What?")])
        await home.ask(session_id="s1", client_message_id="q1", message_text="What?")
        contents = await home.database.fetch("select role from messages where chat_id = 's1' order by position")
        assert [row["role"] for row in contents] == ["user", "assistant"]
        rows = await agreed(home.database)
        assert (rows[0]["count"], rows[0]["chatbot_id"]) == (2, "quick")
        await home.database.execute("delete from idempotency_keys")
        again = await home.post(session_id="s1", client_message_id="q1", message_text="What?")
        assert (again.status_code, again.json()["code"]) == (409, "message_exists")
        pushed = await sync(home.client, "phone", [add("q1", "s1", "What?")], first=2)
        assert "results" not in pushed
        assert (await agreed(home.database))[0]["count"] == 2


async def test_an_answer_in_the_making_can_be_followed_from_another_device(house: Open) -> None:
    async with house({"slow": "demo?delay_ms=20&tokens=100000"}) as home:
        accepted = (await home.post("slow", session_id="s1")).json()
        cursor = (await sync(home.client, "desk"))["cursor"]
        seen = await sync(home.client, "desk", cursor=cursor)
        (stream,) = seen["active_streams"]
        assert (stream["chat_id"], stream["streaming_session_id"]) == ("s1", accepted["streaming_session_id"])
        page = (await home.client.get(f"/api/stream-events/{stream['streaming_session_id']}")).json()
        assert page["last_event_id"] >= stream["last_event_id"] >= 1
        await sync(home.client, "desk", [delete("s1", 1 << 40)], cursor=cursor)
        await home.client.post(f"/api/stream-events/{stream['streaming_session_id']}/cancel")
        gone = await sync(home.client, "desk")
        assert gone["chats"][0].get("is_deleted"), "its answer does not bring it back"
        assert "active_streams" not in gone
        assert await home.database.fetchval("select count(*) from conversations") == 0


async def test_what_was_there_before_devices_were_is_sent_to_them(house: Open) -> None:
    async with house() as home:
        for _ in range(2):
            await home.ask(session_id="s1")
        # As the version before left it.
        await home.database.execute("update messages set seq = 0, stamp = '000000000000-0000'")
        await home.database.execute("update chats set seq = 0")
        await home.database.execute("delete from sync_head")
        answer = await sync(home.client, "phone")
        assert (len(answer["chats"]), len(answer["messages"]), answer["bootstrap"]) == (1, 4, True)
        roles = [message["role"] for message in sorted(answer["messages"], key=lambda one: one["stamp"])]
        assert roles == ["user", "assistant"] * 2
        assert (await sync(home.client, "phone", cursor=answer["cursor"]))["messages"] == []


async def test_switched_off_it_says_so(house: Open) -> None:
    async with house(sync_enabled=False) as home:
        for response in (
            await home.client.get("/api/chat/sync", params={"user_id": "ann"}),
            await home.client.post("/api/chat/sync", json={"client": "a", "user_id": "ann"}),
        ):
            assert (response.status_code, response.json()["code"]) == (403, "sync_disabled")


# -- who


async def test_the_same_ids_of_another_user_are_other_things(database: str) -> None:
    connection = await asyncpg.connect(database)
    async with serving_users(database) as client:

        async def exchange(who: str, *ops: Json, mid: int = 1) -> Json:
            push = [{"mid": mid, "ops": list(ops)}] if ops else []
            body = {"client": "phone", "push": push}
            answer = await client.post("/api/chat/sync", json=body, headers=as_user(who))
            assert answer.status_code == 200, answer.text
            told: Json = answer.json()
            return told

        await exchange("ann", put("c", "Ann's"), add("m", content="The secret of the user."))
        before = await connection.fetch("select * from messages where user_id = 'ann'")
        # Each as for ids that nobody has.
        for told in (
            await exchange("bob", {"op": "msg.del", "id": "m"}, add("m", content="Mine"), put("c", "Bob's", at=-9)),
            await exchange("bob", delete("c", 99), {"op": "msg.del", "id": "m"}, mid=2),
        ):
            assert "secret" not in str(told)
            assert "results" not in told
        assert await connection.fetch("select * from messages where user_id = 'ann'") == before
        assert [chat["title"] for chat in (await exchange("ann"))["chats"]] == ["Ann's"]
        named = {"client": "phone", "user_id": "ann"}
        refused = await client.post("/api/chat/sync", json=named, headers=as_user("bob"))
        assert (refused.status_code, refused.json()["code"]) == (403, "user_mismatch")
        key = await keys.create(connection, "no sync", ["process", "read"])
        response = await client.post("/api/chat/sync", json=named, headers=as_user(key))
        assert (response.status_code, response.json()["code"]) == (403, "scope_missing")
    await connection.close()


async def test_many_pushes_at_once_are_one_after_the_other(house: Open) -> None:
    async with house() as home:
        await sync(home.client, "reader")

        async def push(device: str) -> None:
            for mid in range(1, 6):
                await sync(home.client, device, [add(f"{device}-{mid}")], first=mid)

        await asyncio.gather(*(push(f"d{n}") for n in range(6)))
        positions = await home.database.fetch("select position from messages order by position")
        assert [row["position"] for row in positions] == list(range(1, 31))
        assert await home.database.fetchval("select count(distinct seq) from messages") == 30
        await agreed(home.database)


async def test_ids_that_are_derived_from_each_other_are_looked_for_once(house: Open) -> None:
    async with house() as home:
        ops = [add("a", content="One"), add("a", content="Two"), {"op": "msg.del", "id": fork_of("a", "One")}]
        answer = await asyncio.wait_for(sync(home.client, "phone", ops), 10)
        assert [op["status"] for op in answer["results"][0]["ops"]] == ["forked"]
        assert len(_ids(answer)[1] | {"a"}) == 2


async def test_a_retry_that_names_another_chat_is_one_of_the_message_that_failed(house: Open) -> None:
    async with house() as home:
        await sync(home.client, "phone", [put("c"), add("m", content="", status="failed")], failed=True)
        for chat, counted in (("c", []), ("d", [("c", 1)])):
            if chat == "d":
                await sync(home.client, "phone", [add("m", "d", at=1)], first=2, failed=True)
            assert [(row["conversation_id"], row["count"]) for row in await agreed(home.database)] == counted
        await sync(
            home.client, "phone", [add("n", content="", status="failed")], [delete("c", 9)], first=3, failed=True
        )
        await sync(home.client, "phone", [add("n", "d", at=1)], first=5)
        assert await agreed(home.database) == []


async def test_who_says_again_what_failed_and_was_deleted_is_told_that_it_was(house: Open) -> None:
    async with house() as home:
        failed = [put("c"), add("m", content="", status="failed")]
        await sync(home.client, "phone", failed, [{"op": "msg.del", "id": "m"}], failed=True)
        desk = await sync(home.client, "desk")
        told = await sync(home.client, "desk", [add("m", content="At last", at=1)], cursor=desk["cursor"])
        assert [(one["id"], one["is_deleted"]) for one in told["messages"]] == [("m", True)]


def test_what_is_remembered_of_devices_is_bounded() -> None:
    """All of it is read by each exchange of the user."""
    head = Head("e", 0, 0, 0, {}, datetime.now(UTC), 0)
    lost = [{"mid": mid, "ops": [{"id": "x" * 128, "status": "lost"}] * 60} for mid in (1, 2)]
    for number in range(MOST_CLIENTS + 20):
        head.now_ms = number
        remember(head, Asked(f"d{number}", push=[Mutation(2, [])]), lost)
    assert len(head.clients) == MOST_CLIENTS
    assert "d19" not in head.clients
    told = [client for client in head.clients if "results" in head.clients[client]]
    assert told == [f"d{number}" for number in range(110, 120)]
    assert head.clients["d119"] == {"mid": 2, "at": 119, "results": lost[:1]}
