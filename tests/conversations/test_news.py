"""News of the index: who shows lists hears which conversations have changed, of the own ones, wherever it was."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from time import time
from typing import Any

import asyncpg
import httpx2
import orjson
import pytest

from app.access import keys
from app.conversations import news
from app.conversations.news import News
from app.postgres import open_pool
from app.server import gateway
from app.settings import load
from app.streams.topics import Topics
from tests.access.issuer import token
from tests.access.users import as_user, serving_users
from tests.house import Open
from tests.serving import UNLIMITED, client_of, serving, until_ready
from tests.sync.test_gateway import add, put, sync

URL = "/api/messages/conversations/events"
# Nobody looks at the table by itself.
DEAF = {"poll_s": 600}
_SSE = {"Accept": "text/event-stream"}


class Reader:
    """One connection, and the data of its `changed` frames."""

    def __init__(self, client: httpx2.AsyncClient, headers: dict[str, str], params: dict[str, str]) -> None:
        self.status = 0
        self.body = b""
        self.frames: list[dict[str, Any]] = []
        self._news = asyncio.Event()
        self._reading = asyncio.create_task(self._read(client, headers, params))

    async def _read(self, client: httpx2.AsyncClient, headers: dict[str, str], params: dict[str, str]) -> None:
        try:
            async with client.stream("GET", URL, params=params, headers=_SSE | headers, timeout=60) as response:
                self.status = response.status_code
                async for data in response.aiter_raw():
                    self.body += data
                    lines = self.body.rpartition(b"\n\n")[0].split(b"\n")
                    self.frames = [orjson.loads(line[6:]) for line in lines if line.startswith(b"data: ")]
                    self._news.set()
        finally:
            self._news.set()

    @property
    def named(self) -> set[tuple[str, str, str]]:
        """Everything that was ever named."""
        return {
            (one["source"], one["username"], one["conversationId"])
            for frame in self.frames
            for one in frame["conversations"]
        }

    @property
    def alls(self) -> int:
        return sum(frame["all"] for frame in self.frames)

    async def until(self, true: Callable[["Reader"], Any]) -> None:
        async with asyncio.timeout(15):
            while not true(self):
                assert not self._reading.done(), f"closed after {self.body!r}"
                self._news.clear()
                await self._news.wait()

    async def closed(self) -> None:
        await asyncio.wait_for(asyncio.shield(self._reading), 10)

    async def leave(self) -> None:
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)


@asynccontextmanager
async def reading(
    client: httpx2.AsyncClient, headers: dict[str, str] | None = None, *, informed: bool = True, **params: str
) -> AsyncGenerator[Reader, None]:
    reader = Reader(client, headers or {}, params)
    try:
        if informed:
            await reader.until(lambda one: one.frames)
            assert reader.frames[0] == {"all": True, "conversations": []}
        yield reader
    finally:
        await reader.leave()


async def test_what_is_saved_is_named_and_only_to_whom_it_belongs(house: Open) -> None:
    async with (
        house(**DEAF) as home,
        reading(home.client) as everybody,
        reading(home.client, username="ann") as ann,
        reading(home.client, user_id="bob") as bob,
    ):
        # Where the bus has just come up the first changes are told as "all".
        await home.ask(user_id="eve")
        await everybody.until(lambda one: len(one.frames) > 1)
        await home.ask(session_id="c", message_text="Hello")
        for reader in (everybody, ann):
            await reader.until(lambda one: ("parley", "ann", "c") in one.named)
        await home.ask(user_id="bob", session_id="d")
        await bob.until(lambda one: one.named)
        assert bob.named == {("parley", "bob", "d")}
        await everybody.until(lambda one: ("parley", "bob", "d") in one.named)
        await sync(home.client, "phone", [put("e"), add("m", "e", "Again")])
        await ann.until(lambda one: len(one.named) == 2)
        assert ann.named == {("parley", "ann", "c"), ("parley", "ann", "e")}
        assert "Hello" not in everybody.body.decode()


async def test_what_cannot_be_named_is_all_to_whom_it_belongs(house: Open) -> None:
    async with (
        house(**DEAF) as home,
        reading(home.client, username="ann") as ann,
        reading(home.client, username="bob") as bob,
    ):
        await sync(home.client, "phone", [put("c"), add("m", "c")])
        await ann.until(lambda one: len(one.frames) > 1)
        before = ann.alls
        deleted = await home.client.delete("/api/chats/c", params={"user_id": "ann"})
        assert deleted.status_code < 300, deleted.text
        await ann.until(lambda one: one.alls > before)
        assert len(bob.frames) == 1


async def test_what_others_do_to_the_index_is_seen_by_looking(house: Open) -> None:
    async with house(poll_s=0.05) as home, reading(home.client) as reader:
        await home.database.execute(
            "insert into conversation_source_state (source, version, rows) values ('log', 1, 7)"
        )
        await reader.until(lambda one: one.alls == 2)
        assert (await home.client.delete("/api/sync/index")).status_code == 200
        await reader.until(lambda one: one.alls == 3)


@pytest.mark.parametrize(
    "how", [{"bus": "notify", "poll_s": 600}, {"bus": "poll", "poll_s": 0.05}], ids=["bus", "poll"]
)
async def test_a_change_at_one_replica_is_heard_of_at_the_other(database: str, how: dict[str, Any]) -> None:
    async with (
        serving(database, **how) as writing,
        serving(database, **how) as other,
        reading(other, username="ann") as far,
        reading(writing, username="ann") as near,
    ):
        for number in range(1, 4):
            before = {reader: len(reader.frames) for reader in (far, near)}
            await sync(writing, "phone", [put(f"c{number}"), add(f"m{number}", f"c{number}")], first=number)
            for reader in (far, near):
                # By its name, or as "all" where the bus has just come up.
                await reader.until(lambda one, then=before: len(one.frames) > then[one])  # type: ignore[misc]
        assert ("parley", "ann", "c3") in far.named & near.named


async def test_it_ends_with_its_time_its_token_and_its_server(house: Open, database: str) -> None:
    async with house(sse_max_age_s=0.5) as home, reading(home.client) as aged:
        await aged.closed()
        assert b"retry: " in aged.body.rpartition(b"\n\n")[2]
    soon = {"Authorization": f"Bearer {token('two', 'ES256', sub='ann', exp=int(time()) + 2)}"}
    async with serving_users(database, jwt_leeway_s=0) as client, reading(client, soon) as late:
        await late.closed()
    async with AsyncExitStack() as stack:
        async with gateway(load(auth="open", **UNLIMITED, database_url=database, port=0, drain_s=0)) as url:
            client = await stack.enter_async_context(client_of(url))
            await until_ready(client)
            left = await stack.enter_async_context(reading(client))
        await left.closed()


async def test_a_user_is_told_of_nobody_else_and_needs_the_scope(database: str) -> None:
    look = await asyncpg.connect(database)
    async with (
        serving_users(database, **DEAF) as client,
        reading(client, as_user("ann")) as ann,
        reading(client, as_user("bob")) as bob,
    ):
        await sync_as(client, "ann", "b")
        await ann.until(lambda one: len(one.frames) > 1)
        await sync_as(client, "ann", "c", mid=2)
        await ann.until(lambda one: ("parley", "ann", "c") in one.named)
        await sync_as(client, "bob", "d")
        await bob.until(lambda one: one.named)
        assert {name[1] for name in ann.named} == {"ann"}
        assert bob.named == {("parley", "bob", "d")}
        for params in ({"username": "ann"}, {"user_id": "ann"}):
            refused = await client.get(URL, params=params, headers=as_user("bob"))
            assert (refused.status_code, refused.json()["code"]) == (403, "user_mismatch")
        key = await keys.create(look, "no index", ["process", "read"])
        refused = await client.get(URL, headers=as_user(key))
        assert (refused.status_code, refused.json()["code"]) == (403, "scope_missing")
    await look.close()


async def sync_as(client: httpx2.AsyncClient, user: str, chat: str, *, mid: int = 1) -> None:
    body = {"client": f"{user}-phone", "push": [{"mid": mid, "ops": [put(chat), add(f"m-{chat}", chat)]}]}
    response = await client.post("/api/chat/sync", json=body, headers=as_user(user))
    assert response.status_code == 200, response.text


async def test_full_houses_send_readers_away_and_nobody_is_left_behind(house: Open) -> None:
    async with house(user_readers=1, **DEAF) as home:
        async with reading(home.client, username="ann"):
            second = await home.client.get(URL, params={"username": "ann"}, headers=_SSE)
            assert (second.status_code, second.content[:7]) == (200, b"retry: ")
        assert (await home.client.head(URL, headers=_SSE)).status_code == 200
        async with reading(home.client, username="ann"):
            pass


_ROW = """
insert into conversations (source, username, conversation_id, first_message_at, last_message_at, time_source,
    message_count, total_tokens)
select 'parley', 'u' || n % 2, 'c' || n, now(), now() + n * interval '1 microsecond', 'message', 1, 0
from generate_series($1::int, $2::int) n
"""


async def test_looks_are_bounded_whatever_has_changed(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(news, "_PACE_S", 0)
    monkeypatch.setattr(news, "_ALL_S", 0)
    pool = await open_pool(database, 2)
    one = News(pool, Topics())

    async def told(username: str | None) -> news.Told:
        following = one.follow(username, max_age_s=10)
        follower = asyncio.create_task(anext(following))
        await asyncio.sleep(0)
        await one.look_once()
        assert (await follower).is_all
        return following  # type: ignore[return-value]

    following: Any = await told("u1")
    await pool.execute(_ROW, 1, 10)
    await one.look_once()
    first = await anext(following)
    assert (len(first.conversations), first.is_all) == (5, False)
    await pool.execute(_ROW, 11, 500)
    await one.look_once()
    assert (await anext(following)) == news.Told([], is_all=True), "more than one reader is told of"
    await pool.execute(_ROW, 501, 501 + news._MOST)
    await one.look_once()
    assert (await anext(following)).is_all
    # A clock that is years ahead is nobody's news, and keeps nothing else from being told.
    await pool.execute("update conversations set last_message_at = '2099-01-01'")
    await one.look_once()
    await pool.execute(_ROW, 9001, 9001)
    await one.look_once()
    assert [row.id for row in (await anext(following)).conversations] == ["c9001"]
    # What committed late is as old as its transaction.
    await pool.execute(
        "update conversations set last_message_at = now() - interval '5 seconds' where conversation_id = 'c1'"
    )
    await one.look_once()
    assert [row.id for row in (await anext(following)).conversations] == ["c1"]
    await following.aclose()
    await pool.close()


async def test_a_look_walks_the_end_of_the_list_only(database: str) -> None:
    connection = await asyncpg.connect(database)
    await connection.execute(_ROW, 1, 20_000)
    await connection.execute("update conversations set last_message_at = last_message_at - id * interval '1 hour'")
    await connection.execute("analyze conversations; set plan_cache_mode = force_generic_plan")
    await connection.execute("prepare look (float8, int) as " + news._RECENT)
    lines = await connection.fetch("explain execute look (1700000000, 100)")
    assert any("conversations_recent" in line[0] for line in lines), lines
    await connection.close()


async def test_a_deletion_is_told_that_is_heard_of_after_the_look_that_saw_it(database: str) -> None:
    """One exchange deletes a chat and adds to another: what is heard comes after the commit, a look perhaps before."""
    pool = await open_pool(database, 1)
    one, reader = News(pool, Topics()), news._Reader("ann")
    one._readers.add(reader)
    reader.is_informed = True
    row = news.Conversation("y", "parley", "ann")
    before = news._Seen(0, "", {"ann": "e.1"}, {}, {})
    after = news._Seen(1, "", {"ann": "e.2"}, {1: 1}, {1: row})
    one._tell(before, after, is_stirred=False)
    assert reader.take() == news.Told([row])
    one._tell(after, after, is_stirred=True)
    assert reader.take() == news.Told([], is_all=True)
    one._tell(after, after, is_stirred=True)
    assert reader.take() is None
    await pool.close()
