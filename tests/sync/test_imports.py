"""Importing files of chats through a real gateway: once or twice, whole or broken, of whichever program."""

import asyncio
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, cast

import httpx2
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import Invalid
from app.sync.changes import Changes
from app.sync.imports import elements as elements_module
from app.sync.imports import importing
from app.sync.imports.elements import Elements
from tests.access.users import as_user, serving_users
from tests.conversations.counted import agreed
from tests.house import House, Open
from tests.sync.test_gateway import add, delete, put, sync

Json = dict[str, Any]
_FIXTURES = Path(__file__).parent / "fixtures"
_ANN = {"user_id": "ann"}
_ROWS = "select xmin::text, id from messages union all select xmin::text, id from chats"


async def _import(client: httpx2.AsyncClient, body: Any, user: str = "ann") -> Json:
    content = body if isinstance(body, bytes) else orjson.dumps(body)
    answer = await client.post("/api/chats/import", params={"user_id": user}, content=content)
    assert answer.status_code == 200, answer.text
    told: Json = answer.json()
    return told


async def _exported(home: House, user: str = "ann") -> list[Json]:
    told = (await home.client.get("/api/chats/export", params={"user_id": user})).json()
    chats: list[Json] = told["chats"]
    return chats


def _said(chat: Json) -> list[tuple[str, str, str]]:
    return [(one["role"], one["content"], one["timestamp"]) for one in chat["messages"]]


async def _twice(home: House, body: bytes) -> Json:
    """The first answer; the second time nothing is added and nothing written."""
    first = await _import(home.client, body)
    written = await home.database.fetch(_ROWS)
    again = await _import(home.client, body)
    assert (again["added"], again["messages"]) == ({"chats": 0, "messages": 0}, first["messages"])
    assert await home.database.fetch(_ROWS) == written
    assert await home.count("usage_ledger") == 0
    await agreed(home.database)
    return first


async def test_conversations_of_chatgpt_become_chats(house: Open) -> None:
    async with house() as home:
        told = await _twice(home, (_FIXTURES / "chatgpt.json").read_bytes())
        assert (told["formats"], told["chats"], told["messages"], told["leftOut"]) == (["chatgpt"], 2, 5, 1)
        assert told["added"] == {"chats": 2, "messages": 5}
        plants, silent = sorted(await _exported(home), key=lambda chat: -len(chat["messages"]))
        assert plants["title"] == "Plants for a balcony"
        assert _said(plants) == [
            ("user", "What grows in the shade?", "2023-11-14T22:13:21.500Z"),
            ("assistant", 'Ferns and ivy, "mostly".\nSee {this} [list].', "2023-11-14T22:13:32.250Z"),
            ("user", "And this one?", "2023-11-14T22:14:20.000Z"),
            ("assistant", "A fern 🌿, too.", "2023-11-14T22:14:22.000Z"),
        ]
        assert [one.get("parentId") for one in plants["messages"]] == [
            None,
            *(one["id"] for one in plants["messages"][:-1]),
        ]
        assert (silent["title"], _said(silent)) == (
            "A question without an answer",
            [("user", "A question without an answer", "2023-11-14T22:30:00.000Z")],
        )
        listed = (await home.client.get("/api/chats", params=_ANN)).json()["chats"]
        assert [chat["id"] for chat in listed] == [silent["id"], plants["id"]], "by when it was said, not by the import"
        seen = await sync(home.client, "phone")
        assert len(seen["messages"]) == 5


async def test_exports_of_open_webui_become_chats(house: Open) -> None:
    async with house() as home:
        told = await _twice(home, (_FIXTURES / "open_webui.json").read_bytes())
        assert (told["formats"], told["chats"], told["messages"], told["leftOut"]) == (["open_webui"], 2, 5, 1)
        rivers, old = sorted(await _exported(home), key=lambda chat: -len(chat["messages"]))
        assert (rivers["title"], [one["content"] for one in rivers["messages"]]) == (
            "Rivers",
            ["Name a river.", "The Danube.", "How long is it?"],
        )
        assert (old["title"], [one["content"] for one in old["messages"]]) == ("Old", ["Hi", "Hello!"])


async def test_an_export_of_ours_is_the_same_again_wherever_it_is_imported(house: Open) -> None:
    async with house() as home:
        await home.ask(session_id="s1", message_text="What?")
        await sync(home.client, "phone", [put("b", "B", parent_chat_id="s1"), add("m", "b", attachments=[{"a": 1}])])
        file = (await home.client.get("/api/chats/export", params=_ANN)).content
        for user in ("bob", "ann"):
            told = await _import(home.client, file, user)
            assert (told["formats"], told["messages"]) == (["parley"], 3)
            assert told["added"] == ({"chats": 2, "messages": 3} if user == "bob" else {"chats": 0, "messages": 0})
        anns, bobs = await _exported(home), await _exported(home, "bob")
        for chat in (*anns, *bobs):
            del chat["createdAt"]
        assert bobs == anns
        assert await home.count("usage_ledger") == 1


async def test_what_was_deleted_comes_back_but_not_what_was_deleted_by_itself(house: Open) -> None:
    async with house() as home:
        await sync(home.client, "phone", [put("c", "Trip"), add("m"), add("n", at=1, content="Other")])
        file = (await home.client.get("/api/chats/export", params=_ANN)).content
        await sync(home.client, "phone", [{"op": "msg.del", "id": "m"}, delete("c", 5)], first=2)
        assert await _exported(home) == []
        assert (await _import(home.client, file))["added"] == {"chats": 1, "messages": 0}
        (back,) = await _exported(home)
        assert (back["title"], [one["content"] for one in back["messages"]]) == ("Trip", ["Other"])
        # Compacted, it is gone for good: a successor takes what is imported.
        await home.database.execute("update chats set is_deleted = true, is_purged = true, title = ''")
        await home.database.execute("delete from messages")
        assert (await _import(home.client, file))["added"] == {"chats": 1, "messages": 2}
        assert (await _import(home.client, file))["added"] == {"chats": 0, "messages": 0}
        (after,) = await _exported(home)
        assert (after["title"], after["id"] != "c", len(after["messages"])) == ("Trip", True, 2)


async def test_ids_that_another_chat_has_lose_nothing(house: Open) -> None:
    async with house() as home:
        await sync(home.client, "phone", [add("1", "mine", content="Mine"), add("2", "mine", at=1)])
        await sync(home.client, "phone", [{"op": "msg.del", "id": "2"}], first=2)
        said = [{"id": str(n), "role": "user", "content": f"Theirs {n}"} for n in (1, 2, 3)]
        chats = [{"id": name, "title": name, "messages": said} for name in "ab"]
        told = await _twice(home, orjson.dumps({"format": "parley", "version": 1, "chats": chats}))
        assert told["added"] == {"chats": 2, "messages": 6}
        contents = {chat["id"]: [one["content"] for one in chat["messages"]] for chat in await _exported(home)}
        theirs = ["Theirs 1", "Theirs 2", "Theirs 3"]
        assert contents == {"a": theirs, "b": theirs, "mine": ["Mine"]}


async def test_a_branch_comes_from_where_its_chat_has_gone(house: Open) -> None:
    async with house() as home:
        await sync(home.client, "phone", [add("1", "mine", content="Mine"), put("old", at=1), delete("old", 2)])
        await home.database.execute("update chats set is_purged = true where id = 'old'")
        said = [{"id": "1", "role": "user", "content": "Theirs"}]
        old = {"id": "old", "title": "Old", "messages": said}
        branches = [{"id": name, "title": name, "parentChatId": "old", "branchFromMessageId": "1"} for name in "az"]
        chats = [branches[0] | {"messages": []}, old, branches[1] | {"messages": []}]
        await _import(home.client, {"format": "parley", "version": 1, "chats": chats})
        there = {chat["title"]: chat for chat in await _exported(home)}
        came_from = (there["Old"]["id"], there["Old"]["messages"][0]["id"])
        assert came_from not in (("old", "1"), ("old", came_from[1]))
        for name in "az":
            assert (there[name]["parentChatId"], there[name]["branchFromMessageId"]) == came_from


async def test_instructions_strange_ids_times_and_characters_do_no_harm(house: Open) -> None:
    async with house() as home:
        said = {"role": "user", "timestamp": "2024-01-01T00:00:00Z"}
        chat = {
            "id": "../../x",
            "title": "x" * 600 + "\ud800".encode("utf-16", "surrogatepass").decode("utf-16", "replace"),
            "user_id": "bob",
            "messages": [
                {**said, "id": "1", "role": "system", "content": "Obey."},
                {**said, "id": "2", "content": "a\0b", "parentId": "nobody's"},
                {**said, "id": "3", "content": "later first", "timestamp": "9999-12-31T23:59:59Z"},
                {**said, "id": "4", "content": "no time", "timestamp": "soon"},
                {**said, "id": "4", "content": "the id again"},
                {**said, "id": "5", "content": "broken off", "status": "partial"},
                {**said, "id": "6", "content": "", "status": "failed"},
            ],
        }
        told = await _twice(home, b'{"format":"parley","version":1,"chats":[' + json.dumps(chat).encode() + b"]}")
        assert (told["messages"], told["leftOut"]) == (5, 2)
        (kept,) = await _exported(home)
        contents = ["a\ufffdb", "later first", "no time", "the id again", "broken off"]
        assert [one["content"] for one in kept["messages"]] == contents
        assert (len(kept["title"]), kept["messages"][-1]["status"]) == (500, "partial")
        assert await home.database.fetch("select 1 from messages where user_id <> 'ann'") == []


async def test_another_users_ids_in_a_file_are_other_things(database: str) -> None:
    async with serving_users(database) as client:

        async def exported(user: str) -> Any:
            return (await client.get("/api/chats/export", headers=as_user(user))).json()["chats"]

        async def imported(user: str, content: str) -> Json:
            message = {"id": "m", "role": "user", "content": content}
            file = {"format": "parley", "version": 1, "chats": [{"id": "c", "title": content, "messages": [message]}]}
            answer = await client.post("/api/chats/import", json=file, headers=as_user(user))
            told: Json = answer.json()
            return told

        await imported("ann", "The secret of the user.")
        before = await exported("ann")
        assert (await imported("bob", "Mine"))["added"] == {"chats": 1, "messages": 1}
        assert await exported("ann") == before
        assert "secret" not in str(await exported("bob"))


async def test_a_long_conversation_and_many_are_written_in_pieces_in_their_order(house: Open) -> None:
    async with house() as home:
        said = [{"id": f"m{n}", "role": "user", "content": f"Text {n}"} for n in range(1234)]
        chats = [{"id": "long", "title": "Long", "messages": said}]
        chats += [{"id": f"c{n}", "title": "", "messages": []} for n in range(600)]
        sent = orjson.dumps({"format": "parley", "version": 1, "chats": chats})

        async def body() -> AsyncGenerator[bytes, None]:
            for start in range(0, len(sent), 1000):
                yield sent[start : start + 1000]

        answer = await home.client.post("/api/chats/import", params=_ANN, content=body())
        assert answer.json()["added"] == {"chats": 601, "messages": 1234}
        # Mutations of a hundred operations at most, so that pages can be cut between them.
        assert await home.database.fetchval("select seq from sync_head") == 19
        transactions = "select count(distinct xmin::text) from messages"
        assert await home.database.fetchval(transactions) == 3
        rows = await home.database.fetch("select content, stamp from messages order by position")
        assert [row["content"] for row in rows] == [f"Text {n}" for n in range(1234)]
        assert len({row["stamp"] for row in rows}) == 1234
        await agreed(home.database)


_GOOD = {"id": "c", "title": "Good", "messages": []}
_BAD: list[tuple[bytes, str, str]] = [
    (b"", "import_invalid", "empty"),
    (b"nonsense", "import_invalid", "no JSON"),
    (b"PK\x03\x04....", "import_invalid", "ZIP"),
    (b"[1, 2]", "import_invalid", "at its beginning"),
    (b'["a"]', "import_invalid", "a text"),
    (b"{}", "import_unknown", "no chats"),
    (b'[{"name": "x"}]', "import_unknown", "no chats"),
    (b'[{"id": "c", "title": "Good", "messages": []}, {"id": "d"', "import_invalid", "behind conversation 1"),
    (b'[{"id": "c", "title": "Good", "messages": []}, {"id": }]', "import_invalid", "Conversation 2"),
    (
        b'[{"id": "c", "title": "Good", "messages": []}, {"":' + b"[" * 200 + b"]" * 200 + b"}]",
        "import_invalid",
        "deep",
    ),
    (b'{"format": "parley", "version": 2, "chats": [{"id": "c"}]}', "import_unknown", "later version"),
    (b'{"x": "' + b"x" * (64 << 10) + b'", "chats": [{"id": "c"}]}', "import_invalid", "before the chats"),
    (b'{"x": ' + b"[" * 200 + b"]" * 200 + b', "chats": [{"id": "c"}]}', "import_invalid", "before the chats"),
    (b'{"format": parley, "chats": [{"id": "c"}]}', "import_invalid", "before the chats"),
]


async def test_files_that_are_none_are_refused_with_the_place_and_what_was_before_is_there(house: Open) -> None:
    async with house(import_limit=100_000) as home:
        for body, code, detail in _BAD:
            answer = await home.client.post("/api/chats/import", params=_ANN, content=body)
            assert (answer.status_code, answer.json().get("code")) == (422, code), body
            assert detail in answer.json()["detail"], answer.text
            assert [chat["id"] for chat in await _exported(home)] == (["c"] if b"Good" in body else [])
            await home.database.execute("delete from chats")
        large = await home.client.post("/api/chats/import", params=_ANN, content=b" " * 100_001)
        assert (large.status_code, large.json()["code"]) == (413, "body_too_large")
        nobody = await home.client.post("/api/chats/import", content=b"[]")
        assert (nobody.status_code, nobody.json()["code"]) == (422, "invalid_request")
        assert (await _import(home.client, []))["chats"] == 0


async def test_what_cannot_be_read_of_a_file_is_named_and_the_rest_is_imported(house: Open) -> None:
    async with house() as home:
        loop = {"a": {"message": None, "parent": "b"}, "b": {"message": None, "parent": "a"}}
        said = {"id": "m", "role": "user", "content": "Hi"}
        webui = {"title": "W", "chat": {"title": "W", "history": {"messages": {"x": 1}, "currentId": "x"}}}
        told = await _import(
            home.client,
            [
                {"id": "c", "title": "Good", "messages": [said]},
                {"title": "Loop", "mapping": loop, "current_node": "a"},
                {"id": "d", "messages": [{**said, "content": 5}]},
                {"id": "e", "messages": [7]},
                {"id": "f", "messages": [{**said, "status": "odd"}]},
                {"id": "g", "messages": [{**said, "attachments": [1]}]},
                {"id": "h", "messages": [{**said, "content": "é" * (1 << 19) + "x"}]},
                {"id": "i", "messages": [{**said, "attachments": [{"x": "é" * (1 << 19)}]}]},
                webui,
                {"title": "Nothing"},
                {"id": "x" * 257, "mapping": {}},
                {"id": ["x"], "mapping": {}},
                {"mapping": {"x" * 257: {"message": None}}},
                {"id": "x" * 257, "chat": {"title": "W", "messages": []}},
                {"title": "Odd", "mapping": {"a": 3}},
            ],
        )
        assert (told["chats"], told["messages"], told["failures"]) == (1, 1, 14)
        reasons = {one["number"]: one["reason"] for one in told["failed"]}
        assert reasons[2].startswith("mapping.")
        assert "ancestor" in reasons[2]
        assert reasons[3].startswith("messages[0].content")
        assert (told["failed"][0]["title"], set(reasons)) == ("Loop", set(range(2, 16)))


async def test_what_waits_to_be_written_is_bounded_with_titles_and_attachments(
    house: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the bound everything waits for the next transaction; nothing is cut or lost but the end of a long title."""
    monkeypatch.setattr(importing, "_MOST_TEXT", 1_000)
    written: list[int] = []
    write = importing.Import._write

    async def counted(file: importing.Import) -> None:
        written.append(file._lines)
        await write(file)

    monkeypatch.setattr(importing.Import, "_write", counted)
    attached = [{"type": "note", "text": "x" * 1_000}]
    messages = [{"id": f"m{n}", "role": "user", "content": "", "attachments": attached} for n in range(3)]
    async with house() as home:
        body: list[Json] = [{"id": "c", "title": "", "messages": messages}]
        body += [{"id": f"t{n}", "title": "T" * 2_000, "messages": []} for n in range(3)]
        assert (await _import(home.client, body))["added"] == {"chats": 4, "messages": 3}
        assert written == [2, 1, 1, 2, 1]
        assert {chat["title"] for chat in await _exported(home)} == {"", "T" * 500}


async def test_a_conversation_that_is_too_large_ends_the_import(house: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elements_module, "LARGEST", 1 << 20)
    async with house() as home:
        body = [{**_GOOD}, {**_GOOD, "id": "d", "title": "x" * (1 << 20)}]
        answer = await home.client.post("/api/chats/import", params=_ANN, json=body)
        assert (answer.json()["code"], "1 MiB" in answer.json()["detail"]) == ("import_invalid", True)
        assert [chat["id"] for chat in await _exported(home)] == ["c"]


async def test_others_have_their_turn_while_a_chunk_is_looked_through() -> None:
    ended, turns = asyncio.Event(), 0

    async def other() -> None:
        nonlocal turns
        while not ended.is_set():
            turns += 1
            await asyncio.sleep(0)

    async def body() -> AsyncGenerator[bytes, None]:
        yield b"[" + b" " * (64 << 10) + b"]"

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(other())
        # Nothing is written.
        await importing.Import(cast(Changes, None), "ann").read(body())
        ended.set()
    assert turns > 10


def test_more_signs_than_a_conversation_may_have_are_refused_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elements_module, "_MOST_SIGNS", 100)
    one = b'{"a":' + b"[" * 48 + b"]" * 48 + b"}"
    assert list(Elements().feed(b"[" + one + b"," + one + b"]")) == [one, one]
    for more in (b'{"a":' + b"[]" * 49, b'{"a":' + b'""' * 49, b'{"a":["' + b'\\"' * 200 + b'"' + b"[]" * 48):
        with pytest.raises(Invalid, match="too many members"):
            _read(Elements(), more)


_NAMES = st.text(alphabet='"\\[{a', max_size=3)
_VALUES = st.recursive(
    st.none() | st.integers() | st.text(alphabet='"\\{}[],:a\n é', max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_NAMES, inner, max_size=3),
    max_leaves=9,
)
_OBJECTS = st.lists(st.dictionaries(_NAMES, _VALUES, max_size=3), max_size=5)


@given(_OBJECTS, st.sampled_from(["list", "ours", "ours with more", "alone"]), st.booleans(), st.data())
def test_elements_are_those_of_the_file_however_its_bytes_come(
    objects: list[Json], kind: str, indented: bool, data: st.DataObject
) -> None:
    whole: Any = objects
    if kind == "alone":
        objects = [*objects, {"a": 1}][:1]
        whole = objects[0]
    elif kind != "list":
        whole = {"about": {"n": ['"chats":[']}, "list": [1], "chats": objects}
        whole |= {"more": ["x", {"y": 1}]} if kind == "ours with more" else {}
    sent = json.dumps(whole, indent=1 if indented else None).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(sent)), max_size=6)))
    reader, found = Elements(), []
    for start, end in zip([0, *cuts], [*cuts, len(sent)], strict=True):
        found += [json.loads(one) for one in reader.feed(sent[start:end])]
    reader.end()
    assert found == objects
    last = 0 if kind == "ours with more" else sent.rindex(b"}" if kind == "alone" else b"]")
    with pytest.raises(Invalid):
        _read(Elements(), sent[: data.draw(st.integers(0, last))])


def _read(elements: Elements, sent: bytes) -> None:
    list(elements.feed(sent))
    elements.end()
