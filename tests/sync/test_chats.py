"""Chats for front ends that do not synchronise, through a real gateway: what they change, devices hear of."""

from typing import Any

import pytest

from app.postgres import open_pool
from app.sync import chats
from app.wall import Reach, Wall, within
from tests.conversations.counted import agreed
from tests.house import House, Open
from tests.sync.test_gateway import add, delete, put, sync

Json = dict[str, Any]


async def _get(home: House, path: str = "", **params: Any) -> Json:
    response = await home.client.get(f"/api/chats{path}", params={"user_id": "ann", **params})
    assert response.status_code == 200, response.text
    told: Json = response.json()
    return told


async def _refused(home: House, method: str, path: str, body: Json | None = None, **params: Any) -> tuple[int, str]:
    response = await home.client.request(method, f"/api/chats{path}", params={"user_id": "ann", **params}, json=body)
    return response.status_code, response.json()["code"]


async def _all(home: House, size: int) -> list[str]:
    found, cursor = [], ""
    while True:
        page = await _get(home, cursor=cursor, size=size)
        assert len(page["chats"]) <= size
        found += [chat["id"] for chat in page["chats"]]
        if page["nextCursor"] is None:
            return found
        cursor = page["nextCursor"]


async def test_chats_are_listed_by_what_was_said_last_and_the_silent_ones_behind(house: Open) -> None:
    # The job that compares the index with its chats may be at it while it is deleted, and put back what it misses.
    async with house(enable_background_jobs=False) as home:
        for n in range(5):
            await sync(home.client, "phone", [put(f"c{n}", f"Chat {n}"), add(f"m{n}", f"c{n}")], first=n + 1)
        await sync(home.client, "phone", [put("z"), put("a"), put("gone", at=1)], [delete("gone", 5)], first=6)
        await sync(home.client, "phone", [add("again", "c1", "Once more", at=9)], first=8)
        wanted = ["c1", "c4", "c3", "c2", "c0", "a", "z"]
        for size in (1, 2, 3, 7, 200):
            assert await _all(home, size) == wanted
        first = (await _get(home))["chats"][0]
        assert (first["title"], first["messageCount"], first["lastMessagePreview"]) == ("Chat 1", 2, "Once more")
        assert (first["createdAt"], first["updatedAt"]) == ("2023-11-14T22:13:20.000Z", "2023-11-14T22:13:20.009Z")
        assert (await _get(home, user_id="bob"))["chats"] == []
        # Without the index everything is still there.
        await home.client.delete("/api/sync/index")
        assert sorted(await _all(home, 2)) == sorted(wanted)
        assert (await _get(home, "/c1"))["messageCount"] == 2


async def test_other_programs_conversations_and_deleted_chats_end_a_page_but_not_the_list(house: Open) -> None:
    async with house() as home:
        await sync(home.client, "phone", [put("c"), add("m")], [put("e")])
        await home.database.execute(
            f"""insert into conversations (source, username, conversation_id, first_message_at, last_message_at,
                time_source, message_count, total_tokens)
            select 'n8n', 'ann', n::text, now(), now(), 'message', 1, 0 from generate_series(1, {chats._FAR}) n"""
        )
        await home.database.execute(
            "insert into chats (user_id, id, is_deleted) "
            f"select 'ann', 'd' || n, true from generate_series(1, {chats._FAR}) n"
        )
        assert (await _get(home))["chats"] == []
        assert await _all(home, 50) == ["c", "e"]


async def test_what_the_index_still_knows_and_is_gone_ends_no_list(house: Open) -> None:
    async with house() as home:
        for n in range(4):
            await sync(home.client, "phone", [put(f"c{n}"), add(f"m{n}", f"c{n}")], first=n + 1)
        await home.database.execute("update chats set is_deleted = true where id in ('c3', 'c1')")
        for size in (1, 2, 9):
            assert await _all(home, size) == ["c2", "c0"]
        assert await _refused(home, "GET", "/c3") == (404, "chat_unknown")


async def test_an_answer_made_here_counts_its_tokens(house: Open) -> None:
    async with house() as home:
        await home.ask(session_id="s1", message_text="What?")
        told = await _get(home, "/s1")
        assert (told["title"], told["messageCount"]) == ("What?", 2)
        assert told["totalTokens"] > 0
        said = await _get(home, "/s1/messages")
        assert [one["role"] for one in said["messages"]] == ["user", "assistant"]


async def test_what_is_renamed_and_deleted_reaches_devices_and_the_index(house: Open) -> None:
    async with house() as home:
        before = await sync(home.client, "phone", [put("c", "Old", at=30_000_000), add("m")])
        renamed = await home.client.patch("/api/chats/c", params={"user_id": "ann"}, json={"title": "New"})
        assert renamed.json()["title"] == "New"
        seen = await sync(home.client, "phone", cursor=before["cursor"])
        assert [chat["title"] for chat in seen["chats"]] == ["New"]
        head = await home.database.fetchrow("select * from sync_head")
        await home.client.patch("/api/chats/c", params={"user_id": "ann"}, json={"title": "New"})
        assert await home.database.fetchrow("select * from sync_head") == head, "the same again is nothing"
        kept = await home.database.fetch("select title from chat_versions")
        assert [row["title"] for row in kept] == ["Old"]
        gone = await home.client.delete("/api/chats/c", params={"user_id": "ann"})
        assert gone.json() == {"success": True, "id": "c"}
        assert (await sync(home.client, "phone", cursor=seen["cursor"]))["chats"][0]["is_deleted"]
        assert await agreed(home.database) == []
        assert await _refused(home, "DELETE", "/c") == (404, "chat_unknown")
        assert await _refused(home, "GET", "/c/messages") == (404, "chat_unknown")


async def test_messages_come_in_pages_from_both_ends(house: Open) -> None:
    async with house() as home:
        ops = [add(f"m{n}", content=f"Text {n}", at=n) for n in range(7)]
        await sync(home.client, "phone", [*ops, add("f", at=9, status="failed")], failed=True)
        for order, wanted in (("position", [0, 1, 2, 3, 4, 5, 6]), ("-position", [6, 5, 4, 3, 2, 1, 0])):
            seen: list[str] = []
            cursor: str | None = ""
            while cursor is not None:
                page = await _get(home, "/c/messages", size=3, cursor=cursor, sort=order)
                seen += [one["id"] for one in page["messages"]]
                cursor = page["nextCursor"]
            assert seen == [f"m{n}" for n in wanted]
        assert len((await _get(home, "/c/messages", failed="true"))["messages"]) == 8


async def test_a_page_of_messages_is_bounded_in_bytes_but_has_one(house: Open) -> None:
    async with house() as home:
        await sync(home.client, "phone", [put("c"), *(add(f"m{n}", at=n) for n in range(3))])
        await home.database.execute("update messages set content = repeat('x', $1)", chats._BYTES)
        first = await _get(home, "/c/messages")
        assert [one["id"] for one in first["messages"]] == ["m0"]
        assert [one["id"] for one in (await _get(home, "/c/messages", cursor=first["nextCursor"]))["messages"]] == [
            "m1"
        ]


async def test_a_branch_is_a_copy_that_goes_its_own_way(house: Open) -> None:
    async with house() as home:
        await home.ask(session_id="s1", client_message_id="q1", message_text="One?")
        await home.ask(session_id="s1", client_message_id="q2", message_text="Two?")
        cursor = (await sync(home.client, "phone"))["cursor"]
        usage = await home.count("usage_ledger")
        body = {"message_id": "q2", "id": "b1", "title": "Other"}
        for _ in range(2):
            made = await home.client.post("/api/chats/s1/branch", params={"user_id": "ann"}, json=body)
            told = made.json()
            assert (told["title"], told["parentChatId"], told["branchFromMessageId"]) == ("Other", "s1", "q2")
            assert told["messageCount"] == 3
        assert (await _get(home, "/s1"))["branches"] == ["b1"]
        said = (await _get(home, "/b1/messages"))["messages"]
        assert [one["content"] for one in said][::2] == ["One?", "Two?"]
        seen = await sync(home.client, "phone", cursor=cursor)
        synced = sorted(seen["messages"], key=lambda one: one["stamp"])
        assert [one["id"] for one in synced] == [one["id"] for one in said]
        assert (seen["chats"][0]["parent_chat_id"], seen["chats"][0]["id"]) == ("s1", "b1")
        assert await home.count("usage_ledger") == usage
        await home.ask(session_id="b1", message_text="Three?")
        assert (await _get(home, "/s1"))["messageCount"] == 4
        rows = {row["conversation_id"]: row for row in await agreed(home.database)}
        assert rows["b1"]["count"] == 5


async def test_a_long_branch_is_copied_in_pieces_in_its_order(house: Open) -> None:
    async with house() as home:
        for batch in range(2):
            ops = [[add(f"m{batch}-{n}-{k}", at=0) for k in range(100)] for n in range(6)]
            await sync(home.client, "phone", *ops, first=1 + 6 * batch)
        answer = await home.client.post(
            "/api/chats/c/branch", params={"user_id": "ann"}, json={"message_id": "m1-5-99"}
        )
        branch = answer.json()
        assert branch["messageCount"] == 1200
        rows = await home.database.fetch(
            "select stamp from messages where chat_id = $1 order by position", branch["id"]
        )
        stamps = [row["stamp"] for row in rows]
        assert stamps == sorted(set(stamps)), "devices see the same order"
        await home.database.execute(
            "insert into messages (user_id, id, chat_id, content, role, position) "
            "select 'ann', 'x' || n, 'c', '', 'user', 2000 + n from generate_series(1, 9000) n"
        )
        refused = await _refused(home, "POST", "/c/branch", {"message_id": "x9000"})
        assert refused == (422, "branch_too_long")


async def test_what_cannot_be_is_refused_and_changes_nothing(house: Open) -> None:
    async with house() as home:
        await sync(home.client, "phone", [put("c"), add("m"), put("other")])
        head = await home.database.fetchrow("select * from sync_head")
        for method, path, body, refused in (
            ("GET", "", None, (400, "bad_cursor")),
            ("PATCH", "/c", {"title": ""}, (422, "invalid_request")),
            ("PATCH", "/c", {"title": "x" * 501}, (422, "invalid_request")),
            ("PATCH", "/c", {}, (422, "invalid_request")),
            ("PATCH", "/nobodys", {"title": "x"}, (404, "chat_unknown")),
            ("DELETE", "/a%00b", None, (404, "chat_unknown")),
            ("POST", "/c/branch", {"message_id": "nobodys"}, (404, "message_unknown")),
            ("POST", "/c/branch", {"message_id": "m", "id": "other"}, (409, "chat_exists")),
            ("POST", "/c/branch", {"message_id": "m", "id": "a/b"}, (422, "invalid_request")),
            ("GET", "/c/messages", None, (400, "bad_parameter")),
        ):
            assert await _refused(home, method, path, body, cursor="?" if method == "GET" else "") == refused, path
        assert (await home.client.get("/api/chats")).status_code == 422
        assert await home.database.fetchrow("select * from sync_head") == head
        assert await home.count("sync_head") == 1


def test_cursors_of_lists_are_read_as_they_were_told_and_nothing_else_is() -> None:
    for place in (chats.Place(id=7), chats.Place(chat="a.b"), chats.Place(chat="")):
        assert chats.place(str(place)) == place
    for bad in ("x", "cy4x", "cy4xLi0x", "ZS4A", "cy45OTk5OTk5OTk5OTk5OTk5OTk5OTkuMQ"):
        with pytest.raises(Exception, match="cursor"):
            chats.place(bad)


@pytest.mark.parametrize(
    ("query", "values", "indexes"),
    [
        (chats._SPOKEN, (chats.Place().at, 0, 51), ("conversations_of_user", "messages_in_chat", "chats_of_parent")),
        (chats._SILENT, ("", 51), ("chats_pkey", "conversations_key", "messages_in_chat", "chats_of_parent")),
        (chats._ONE, ("c",), ("chats_pkey", "messages_in_chat", "chats_of_parent")),
        (chats._BACKWARD, ("c", 9, 51, False), ("messages_in_chat",)),
    ],
)
async def test_lists_are_read_by_their_indexes(
    database: str, query: str, values: tuple[object, ...], indexes: tuple[str, ...]
) -> None:
    pool = await open_pool(database, 2)
    async with Wall(pool, demand="require").open(database, 2) as wall:
        async with pool.acquire() as connection:
            await wall.look_for_role(connection)
        with within(Reach("ann")):
            async with wall.connection() as connection:
                await connection.execute("set local enable_seqscan = off")
                plan = [row[0] for row in await connection.fetch(f"explain (costs off) {query}", "ann", *values)]
    pool.terminate()
    text = "\n".join(plan)
    assert all(index in text for index in indexes), text
    assert "Seq Scan" not in text, text
