"""Taking over another user's chats through a real gateway: with proof, once, and nothing is lost on the way."""

import asyncio
from collections.abc import Sequence
from typing import Any

import asyncpg
import pytest

from app.access import keys
from app.access.audit import fingerprint
from app.sync.claim import Claim
from app.sync.merge import Chat
from tests.access.issuer import token
from tests.access.users import as_user, serving_users
from tests.chats.pictures import base64_of, picture
from tests.house import House, Open
from tests.sync.test_gateway import add, delete, put, sync

Json = dict[str, Any]

# The same picture for another user.
_UPLOADED = """
insert into images select (jsonb_populate_record(i, jsonb_build_object('id', gen_random_uuid(), 'user_id', 'ann'))).*
from images i where user_id = 'anon' returning id::text
"""


async def _claim(home: House, user: str = "ann", of: str = "anon") -> tuple[int, Json]:
    answer = await home.client.post("/api/chats/claim", params={"user_id": user}, json={"from_user_id": of})
    return answer.status_code, answer.json()


async def _chats(home: House, user: str) -> Json:
    told = (await home.client.get("/api/chats/export", params={"user_id": user})).json()
    return {chat["id"]: chat for chat in told["chats"]}


def _said(chat: Json) -> list[Json]:
    """What was said; times of the gateway's own are those of stamps now, to the millisecond."""
    return [{name: value for name, value in one.items() if name != "timestamp"} for one in chat["messages"]]


async def test_everything_moves_and_devices_of_both_hear_of_it(house: Open) -> None:
    async with house() as home:
        await home.ask(session_id="s1", user_id="anon", message_text="What?")
        ops = [put("c", "Trip"), add("m"), add("n", at=1, role="assistant", parent_id="m", attachments=[{"a": 1}])]
        anon = await sync(home.client, "old", ops, user="anon")
        await sync(home.client, "old", [put("gone"), delete("gone", 1)], [put("e", "Empty")], first=2, user="anon")
        own = await sync(home.client, "phone", [put("mine")])
        before = await _chats(home, "anon")
        usage = await home.database.fetch("select user_id, stream_id from usage_ledger")
        status, told = await _claim(home)
        assert (status, told) == (200, {"success": True, "chats": 3, "messages": 4})
        after = await _chats(home, "ann")
        for name, chat in before.items():
            assert _said(after[name]) == _said(chat)
            assert after[name]["title"] == chat["title"]
        assert after.keys() == before.keys() | {"mine"}
        assert not await _chats(home, "anon")
        seen = await sync(home.client, "phone", cursor=own["cursor"])
        assert {chat["id"] for chat in seen["chats"]} == before.keys()
        left = await sync(home.client, "old", cursor=anon["cursor"], user="anon")
        assert all(chat["is_deleted"] for chat in left["chats"])
        assert await home.database.fetch("select user_id, stream_id from usage_ledger") == usage
        rows = await home.database.fetch("select username, message_count from conversations order by conversation_id")
        assert [tuple(row) for row in rows] == [("ann", 2), ("ann", 2)]
        assert await _claim(home) == (200, {"success": True, "chats": 0, "messages": 0})
        # What came later, too, but for nobody else.
        await sync(home.client, "old", [put("later", at=9)], first=4, user="anon")
        assert (await _claim(home, "eve"))[1]["code"] == "already_claimed"
        assert (await _claim(home))[1]["chats"] == 1
        noted = await home.database.fetch("select target, detail from audit")
        assert [tuple(row) for row in noted] == [("ann", fingerprint("anon"))]


async def test_a_long_chat_is_copied_in_pieces_and_cut_short_is_gone_on_with(
    house: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with house() as home:
        for batch in range(2):
            ops = [[add(f"m{batch}-{n}-{k}", at=0) for k in range(100)] for n in range(6)]
            await sync(home.client, "old", *ops, first=1 + 6 * batch, user="anon")
        before = await _chats(home, "anon")
        tries = 0
        give = Claim._give

        async def cut_short(self: Claim, chat: Chat, messages: Sequence[Any]) -> None:
            nonlocal tries
            tries += 1
            if tries == 2:
                raise ConnectionResetError
            await give(self, chat, messages)

        monkeypatch.setattr(Claim, "_give", cut_short)
        assert (await _claim(home))[0] == 503
        assert len((await _chats(home, "ann"))["c"]["messages"]) == 500
        assert (await _chats(home, "anon")).keys() == {"c"}
        assert await _claim(home) == (200, {"success": True, "chats": 0, "messages": 700})
        contents = [one["id"] for one in (await _chats(home, "ann"))["c"]["messages"]]
        assert contents == [one["id"] for one in before["c"]["messages"]]
        stamps = [
            row[0]
            for row in await home.database.fetch("select stamp from messages where user_id = 'ann' order by position")
        ]
        assert stamps == sorted(set(stamps))


async def test_what_is_written_while_a_chat_moves_is_not_lost(house: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    async with house() as home:
        await sync(home.client, "old", [put("c"), add("m")], user="anon")
        copy, wrote = Claim._copy, False

        async def and_then(self: Claim, chat: Chat) -> Any:
            nonlocal wrote
            state = await copy(self, chat)
            if not wrote:
                wrote = True
                await sync(home.client, "old", [add("n", content="Meanwhile", at=5)], first=2, user="anon")
            return state

        monkeypatch.setattr(Claim, "_copy", and_then)
        assert (await _claim(home))[1]["messages"] == 2
        assert [one["id"] for one in (await _chats(home, "ann"))["c"]["messages"]] == ["m", "n"]
        assert await _chats(home, "anon") == {}


async def test_ids_that_both_have_lose_nothing(house: Open) -> None:
    async with house() as home:
        await sync(home.client, "old", [put("c", "Theirs"), add("m", content="Theirs"), add("x", at=1)], user="anon")
        await sync(home.client, "phone", [put("c", "Mine"), add("m", content="Mine")])
        assert (await _claim(home))[1]["messages"] == 2
        chat = (await _chats(home, "ann"))["c"]
        contents = sorted(one["content"] for one in chat["messages"])
        assert (chat["title"], contents) == ("Mine", ["Hello", "Mine", "Theirs"])


async def test_ids_that_another_chat_has_lose_nothing(house: Open) -> None:
    async with house() as home:
        theirs = [add("1", content="Theirs"), add("2", at=1, parent_id="1"), add("3", at=2, parent_id="2")]
        branches = [put(name, at=3, parent_chat_id="c", branch_from_message_id="1") for name in ("b", "d")]
        await sync(home.client, "old", [put("c"), *theirs, *branches], user="anon")
        await sync(home.client, "phone", [add("1", "mine", content="Mine"), add("2", "mine", at=1)])
        await sync(home.client, "phone", [{"op": "msg.del", "id": "2"}], first=2)
        assert await _claim(home) == (200, {"success": True, "chats": 3, "messages": 3})
        assert await _chats(home, "anon") == {}
        chats = await _chats(home, "ann")
        assert [one["content"] for one in chats["mine"]["messages"]] == ["Mine"]
        messages = chats["c"]["messages"]
        assert [one["content"] for one in messages] == ["Theirs", "Hello", "Hello"]
        assert [one.get("parentId") for one in messages] == [None, *(one["id"] for one in messages[:-1])]
        assert [chats[name]["branchFromMessageId"] for name in ("b", "d")] == [messages[0]["id"]] * 2
        # What is there is not copied again, though the other of that id has gone.
        await home.database.execute("delete from messages where id = '2'")
        await home.database.execute("update chats set is_deleted = false where user_id = 'anon'")
        await home.database.execute("update messages set is_deleted = false where user_id = 'anon'")
        assert (await _claim(home))[1]["messages"] == 0


async def test_pictures_come_along_and_an_answer_under_way_is_waited_for(house: Open) -> None:
    async with house({"slow": "demo?delay_ms=20&tokens=100000"}) as home:
        ids = {}
        for user, size in (("anon", 4), ("anon", 5), ("ann", 4)):
            image = {
                "chatbot_id": "quick",
                "user_id": user,
                "image_data": {"data": base64_of(picture(size=(size, size)))},
            }
            told = await home.client.post("/api/upload-image", json=image)
            ids[user, size] = told.json()["image"]["id"]
        for size in (4, 5):
            named = [{"type": "image", "id": ids["anon", size]}]
            await sync(home.client, "old", [add(f"m{size}", attachments=named)], first=size - 3, user="anon")
        accepted = (await home.post("slow", user_id="anon", session_id="s1")).json()
        assert (await _claim(home))[1]["code"] == "session_busy"
        await home.client.post(f"/api/stream-events/{accepted['streaming_session_id']}/cancel")
        assert (await _claim(home))[0] == 200
        attached = {one["id"]: one["attachments"][0]["id"] for one in (await _chats(home, "ann"))["c"]["messages"]}
        assert attached == {"m4": ids["ann", 4], "m5": ids["anon", 5]}
        owners = await home.database.fetch("select id::text, user_id from images where user_id = 'ann'")
        assert {row["id"] for row in owners} == {ids["ann", 4], ids["anon", 5]}


async def test_a_picture_that_comes_from_elsewhere_meanwhile_is_one(house: Open) -> None:
    async with house() as home:
        image = {"chatbot_id": "quick", "user_id": "anon", "image_data": {"data": base64_of(picture())}}
        name = (await home.client.post("/api/upload-image", json=image)).json()["image"]["id"]
        await sync(home.client, "old", [add("m", attachments=[{"type": "image", "id": name}])], user="anon")
        async with asyncio.timeout(20), home.database.transaction():
            own = await home.database.fetchval(_UPLOADED)
            claiming = asyncio.create_task(_claim(home))
            while not await home.database.fetchval("select count(*) from pg_locks where not granted"):
                pass
        assert (await claiming)[0] == 200
        (message,) = (await _chats(home, "ann"))["c"]["messages"]
        assert message["attachments"][0]["id"] == own


async def test_only_with_proof(database: str) -> None:
    connection = await asyncpg.connect(database)
    async with serving_users(database, jwt_scopes="sync") as client:
        key = await keys.create(connection, "a back end", ["sync"])

        async def claim(who: str, body: Json, **params: str) -> tuple[int, str | None]:
            answer = await client.post("/api/chats/claim", params=params, json=body, headers=as_user(who))
            return answer.status_code, answer.json().get("code")

        def proof(user: str, **claims: Any) -> Json:
            return {"proof": token("two", "ES256", sub=user, **claims)}

        push = {"client": "old", "push": [{"mid": 1, "ops": [put("c"), add("m", content="The secret of the user.")]}]}
        for user in ("anon", "visitor"):
            assert (await client.post("/api/chat/sync", json=push, headers=as_user(user))).status_code == 200
        for body, wanted in (
            ({"from_user_id": "anon"}, (403, "proof_invalid")),
            ({"proof": "nonsense"}, (403, "proof_invalid")),
            ({"proof": key}, (403, "proof_invalid")),
            (proof("anon", exp=1), (403, "proof_invalid")),
            (proof("anon", scope="read"), (403, "proof_invalid")),
            ({**proof("anon"), "from_user_id": "anon"}, (422, "invalid_request")),
            ({}, (422, "invalid_request")),
            (proof("bob"), (422, "invalid_request")),
        ):
            assert await claim("bob", body) == wanted, body
        assert (await client.get("/api/chats", headers=as_user("bob"))).json()["chats"] == []
        assert await connection.fetchval("select count(*) from chat_claims") == 0
        assert await claim("bob", proof("anon")) == (200, None)
        listed = (await client.get("/api/chats", headers=as_user("bob"))).json()["chats"]
        assert [chat["id"] for chat in listed] == ["c"]
        assert await claim("eve", proof("anon")) == (409, "already_claimed")
        assert await claim(key, {"from_user_id": "visitor"}) == (422, "invalid_request")
        assert await claim(key, {"from_user_id": "visitor"}, user_id="eve") == (200, None)
        assert await claim("eve", {"from_user_id": "bob"}, user_id="bob") == (403, "user_mismatch")
        assert (await client.delete("/api/users/anon", headers=as_user("anon"))).status_code == 200
        assert [row[0] for row in await connection.fetch("select from_user_id from chat_claims")] == ["visitor"]
    await connection.close()
