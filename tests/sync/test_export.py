"""Chats as files: whole, of one moment, and a piece at a time."""

import re
from contextlib import aclosing
from typing import Any

import asyncpg
import pytest

from app.errors import NotFound
from app.postgres import open_pool
from app.sync.export import Export, Format
from app.wall import Reach, Wall, within
from tests.house import Open
from tests.sync.test_gateway import add, delete, put, sync

Json = dict[str, Any]
_ANN = {"user_id": "ann"}


async def test_a_chat_and_everything_are_files_for_programs_and_for_people(house: Open) -> None:
    async with house() as home:
        picture = [{"type": "image", "id": "p"}]
        ops = [put("c", "My\ntrip"), add("m", content='Where "to"? 🗺', attachments=picture)]
        await sync(home.client, "phone", [*ops, add("n", content="There.", at=60_000, role="assistant", parent_id="m")])
        await sync(home.client, "phone", [put("d", parent_chat_id="c", branch_from_message_id="m")], first=2)
        await sync(
            home.client, "phone", [put("gone"), delete("gone", 9), add("f", status="failed")], first=3, failed=True
        )
        await sync(home.client, "phone", [put("theirs")], user="bob")
        answer = await home.client.get("/api/chats/export", params=_ANN)
        assert answer.headers["content-disposition"] == 'attachment; filename="chats.json"'
        told = answer.json()
        assert (told["format"], told["version"], [chat["id"] for chat in told["chats"]]) == ("parley", 1, ["c", "d"])
        assert told["chats"][0]["messages"] == [
            {
                "id": "m",
                "role": "user",
                "content": 'Where "to"? 🗺',
                "timestamp": "2023-11-14T22:13:20.000Z",
                "attachments": picture,
            },
            {
                "id": "n",
                "role": "assistant",
                "content": "There.",
                "timestamp": "2023-11-14T22:14:20.000Z",
                "parentId": "m",
            },
        ]
        assert (told["chats"][1]["parentChatId"], told["chats"][1]["branchFromMessageId"]) == ("c", "m")
        one = (await home.client.get("/api/chats/c/export", params=_ANN)).json()
        assert one["chats"] == told["chats"][:1]
        text = (await home.client.get("/api/chats/c/export", params={**_ANN, "format": "markdown"})).text
        assert re.fullmatch(
            'Exported on .* UTC\n\n# My trip\n\n## User, 2023-11-14 22:13\n\nWhere "to"\\? 🗺\n'
            "\n## Assistant, 2023-11-14 22:14\n\nThere.\n",
            text,
        )
        assert (await home.client.get("/api/chats/export", params={"user_id": "nobody"})).json()["chats"] == []
        head = await home.client.head("/api/chats/export", params=_ANN)
        assert (head.status_code, head.content) == (200, b"")
        for path, params, code in (
            ("/api/chats/nobodys/export", _ANN, "chat_unknown"),
            ("/api/chats/c/export", {"user_id": "bob"}, "chat_unknown"),
            ("/api/chats/export", {**_ANN, "format": "pdf"}, "bad_parameter"),
            ("/api/chats/export", {**_ANN, "format": ""}, "bad_parameter"),
            ("/api/chats/export", {}, "invalid_request"),
        ):
            assert (await home.client.get(path, params=params)).json()["code"] == code


@pytest.mark.parametrize("written", ["json", "markdown"])
async def test_ten_thousand_messages_are_many_small_pieces_of_one_moment(database: str, written: Format) -> None:
    connection = await asyncpg.connect(database)
    await connection.execute(
        """insert into chats (user_id, id, title) select 'ann', 'c' || n, 'Chat' from generate_series(0, 299) n;
        insert into messages (user_id, id, chat_id, content, role, position)
        select 'ann', 'm' || n, case when n < 9000 then 'c0' else 'c' || n % 300 end, repeat('x', 2000), 'user', n
        from generate_series(1, 10000) n"""
    )
    pool = await open_pool(database, 2)
    async with Wall(pool, demand="require").open(database, 2) as wall:
        async with pool.acquire() as ours:
            await wall.look_for_role(ours)
        with within(Reach("ann")):
            parts: list[bytes] = []
            async with aclosing(Export(wall, "ann", format=written).parts()) as made:
                async for part in made:
                    if not parts:
                        await connection.execute(
                            "update messages set content = 'later'; delete from chats where id = 'c7'"
                        )
                    parts.append(part)
            with pytest.raises(NotFound):
                await anext(Export(wall, "ann", "c7").parts())
    await connection.close()
    pool.terminate()
    text = b"".join(parts).decode()
    assert text.count("x" * 2000) == 10_000
    assert "later" not in text
    assert text.count("# Chat\n" if written == "markdown" else '"title":"Chat"') == 300
    assert max(map(len, parts)) < 3 << 20
