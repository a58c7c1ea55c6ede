"""Versions of chats: what lost against another word is listed, and comes back on all devices."""

import pytest

from tests.conversations.counted import agreed
from tests.house import Open
from tests.sync.test_chats import _get, _refused
from tests.sync.test_gateway import Json, _ids, add, delete, put, sync


async def test_a_title_that_lost_comes_back_on_all_devices(house: Open) -> None:
    async with house() as home:
        await sync(home.client, "phone", [put("c", "Mine", parent_chat_id="p"), add("m")])
        desk = await sync(home.client, "desk", [put("c", "Yours", at=5)])
        (kept,) = (await _get(home, "/c/versions"))["versions"]
        assert (kept["title"], kept["client"], kept["parentChatId"]) == ("Mine", "phone", "p")
        restored = await home.client.post(f"/api/chats/c/versions/{kept['id']}/restore", params={"user_id": "ann"})
        assert restored.json() == {"success": True, "id": "c", "title": "Mine"}
        (told,) = (await sync(home.client, "desk", cursor=desk["cursor"]))["chats"]
        assert (told["title"], told["parent_chat_id"]) == ("Mine", "p")
        seq = await home.database.fetchval("select seq from sync_head")
        again = await home.client.post(f"/api/chats/c/versions/{kept['id']}/restore", params={"user_id": "ann"})
        assert again.status_code == 200
        assert await home.database.fetchval("select seq from sync_head") == seq, "it is so already"
        titles = [one["title"] for one in (await _get(home, "/c/versions"))["versions"]]
        assert titles == ["Yours", "Mine"], "what it replaced is kept"


async def test_a_deleted_chat_comes_back_with_its_version_until_it_is_purged(house: Open) -> None:
    async with house() as home:
        await sync(home.client, "phone", [put("c", "Mine"), add("m")])
        gone = await sync(home.client, "desk", [delete("c", 5)])
        assert await agreed(home.database) == []
        (kept,) = (await _get(home, "/c/versions"))["versions"]
        path = f"/c/versions/{kept['id']}/restore"
        assert (await home.client.post(f"/api/chats{path}", params={"user_id": "ann"})).status_code == 200
        assert [row["count"] for row in await agreed(home.database)] == [1]
        assert "is_deleted" not in (await sync(home.client, "desk", cursor=gone["cursor"]))["chats"][0]
        await home.database.execute("update chats set is_deleted = true, is_purged = true")
        assert await _refused(home, "POST", path) == (404, "chat_unknown")
        assert await _refused(home, "GET", "/c/versions") == (404, "chat_unknown")


async def test_at_most_twenty_are_kept(house: Open) -> None:
    async with house() as home:
        for n in range(25):
            await sync(home.client, f"d{n % 2}", [put("c", f"Title {n}", at=n)], first=n // 2 + 1)
        found = (await _get(home, "/c/versions"))["versions"]
        assert [one["title"] for one in found] == [f"Title {n}" for n in range(23, 3, -1)]


@pytest.mark.parametrize(
    "version", ["018bcfe56800-0000.desk", "x", "..", "%00", "018bcfe56800-0000.%F0%9F", "9" * 3000]
)
async def test_versions_that_are_not_there_are_unknown(house: Open, version: str) -> None:
    async with house() as home:
        await sync(home.client, "phone", [put("c", "Mine")])
        status, code = await _refused(home, "POST", f"/c/versions/{version}/restore")
        assert status == 404
        assert code in ("version_unknown", "route_unknown")


async def test_what_the_gateway_does_at_once_is_read_in_pages(house: Open) -> None:
    async with house() as home:
        for first in range(6):
            ops: list[Json] = [add(f"m{first}-{n}", at=first * 100 + n) for n in range(100)]
            await sync(home.client, "phone", ops, first=first + 1)
        body = {"message_id": "m5-99", "id": "b"}
        made = await home.client.post("/api/chats/c/branch", params={"user_id": "ann"}, json=body)
        assert made.json()["messageCount"] == 600
        answer = await sync(home.client, "desk")
        seen = _ids(answer)[1]
        for _ in range(9):
            if not answer["more"]:
                break
            answer = await sync(home.client, "desk", cursor=answer["cursor"])
            seen |= _ids(answer)[1]
        assert len(seen) == 1200
