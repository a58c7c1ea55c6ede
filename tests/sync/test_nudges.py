"""Nudges: devices hear that there is something to pull, whoever wrote it and wherever, and are told nothing twice."""

from contextlib import AsyncExitStack
from time import time
from typing import Any

import asyncpg
import pytest

from app.access import keys
from app.demo.server import demo_provider
from app.server import gateway
from app.settings import load
from tests.access.issuer import token
from tests.access.users import as_user, serving_users
from tests.house import Open
from tests.serving import UNLIMITED, apply_demo, client_of, serving, until_ready
from tests.sync.nudged import nudged
from tests.sync.test_gateway import add, put, sync

# Nobody looks at the table by itself.
DEAF = {"poll_s": 600}


async def test_every_writer_of_a_users_chats_is_heard_of(house: Open) -> None:
    async with house(**DEAF) as home, nudged(home.client) as desk, nudged(home.client, "bob") as bob:
        await desk.until(lambda one: one.cursors)
        assert desk.cursors == ["000000000000.0"], "there is nothing yet"
        pushed = await sync(home.client, "phone", [put("c"), add("m")])
        await desk.reached(pushed["cursor"])
        await home.ask(session_id="c")
        pulled = await sync(home.client, "phone", cursor=pushed["cursor"])
        assert len(pulled["messages"]) == 2
        await desk.reached(pulled["cursor"])
        assert len(set(desk.cursors)) == len(desk.cursors)
        assert bob.cursors == ["000000000000.0"]


async def test_who_knows_where_it_stands_is_told_nothing_until_that_changes(house: Open) -> None:
    async with house(**DEAF) as home:
        seen = (await sync(home.client, "phone", [put("c")]))["cursor"]
        async with (
            nudged(home.client, cursor=f"{seen}f") as one,
            nudged(home.client, headers={"Last-Event-ID": seen}, cursor="5b6f1f0a6a55.1") as resumed,
            nudged(home.client, cursor="5b6f1f0a6a55.1") as other,
        ):
            await other.reached(seen)
            for follower in (one, resumed):
                await follower.opened()
            # A change of nothing: the device is known now, and its mutation was empty.
            await sync(home.client, "desk", [])
            now = (await sync(home.client, "phone", [add("m")], first=2))["cursor"]
            for follower in (one, resumed, other):
                await follower.reached(now)
            assert [one.cursors, resumed.cursors, other.cursors] == [[now], [now], [seen, now]]


@pytest.mark.parametrize(
    "how", [{"bus": "notify", "poll_s": 600}, {"bus": "poll", "poll_s": 0.05}], ids=["bus", "poll"]
)
async def test_a_change_at_one_replica_is_heard_of_at_the_other(database: str, how: dict[str, Any]) -> None:
    async with (
        serving(database, **how) as writing,
        serving(database, **how) as reading,
        nudged(reading) as desk,
        nudged(writing) as phone,
    ):
        for mid in range(1, 6):
            pushed = await sync(writing, "phone", [add(f"m{mid}")], first=mid)
            await desk.reached(pushed["cursor"])
            await phone.reached(pushed["cursor"])


async def test_a_newer_connection_of_the_same_device_takes_the_olders_place(house: Open) -> None:
    async with house() as home, nudged(home.client, client="desk") as old, nudged(home.client, client="phone") as phone:
        for follower in (old, phone):
            await follower.until(lambda one: one.cursors)
        async with nudged(home.client, client="desk") as new, nudged(home.client, "bob", client="phone") as bob:
            await old.closed()
            assert (old.replaced, new.replaced) == (True, False)
            assert old.retry_ms >= 30_000, "who does not know what it means comes back later"
            pushed = await sync(home.client, "phone", [put("c")])
            for follower in (new, phone):
                await follower.reached(pushed["cursor"])
            assert bob.cursors == ["000000000000.0"]


async def test_it_ends_with_its_time_its_token_and_its_server(house: Open, database: str) -> None:
    async with house(sse_max_age_s=0.2) as home, nudged(home.client) as aged:
        await aged.closed()
        assert aged.retry_ms >= 1000
    soon = {"Authorization": f"Bearer {token('two', 'ES256', sub='ann', exp=int(time()) + 2)}"}
    async with serving_users(database, jwt_leeway_s=0) as client, nudged(client, None, headers=soon) as late:
        await late.until(lambda one: one.cursors)
        await late.closed()
    async with AsyncExitStack() as stack:
        async with gateway(load(auth="open", **UNLIMITED, database_url=database, port=0, drain_s=0)) as url:
            client = await stack.enter_async_context(client_of(url))
            await until_ready(client)
            left = await stack.enter_async_context(nudged(client))
            await left.until(lambda one: one.cursors)
        await left.closed()
        assert left.retry_ms >= 1000


async def test_who_may_not_follow_does_not(database: str) -> None:
    look = await asyncpg.connect(database)
    async with serving_users(database) as client, nudged(client, None, headers=as_user("ann")) as ann:
        await ann.until(lambda one: one.cursors)
        url = "/api/chat/sync/events"
        refused = await client.get(url, params={"user_id": "ann"}, headers=as_user("bob"))
        assert (refused.status_code, refused.json()["code"]) == (403, "user_mismatch")
        key = await keys.create(look, "no sync", ["process", "read"])
        refused = await client.get(url, params={"user_id": "ann"}, headers=as_user(key))
        assert (refused.status_code, refused.json()["code"]) == (403, "scope_missing")
        for params, status, code in (
            ({"cursor": "x"}, 400, "bad_cursor"),
            ({"client": "a b"}, 422, "invalid_request"),
        ):
            refused = await client.get(url, params=params, headers=as_user("ann"))
            assert (refused.status_code, refused.json()["code"]) == (status, code)
    await look.close()
    async with serving(database, sync_enabled=False) as client:
        refused = await client.get(url, params={"user_id": "ann"})
        assert (refused.status_code, refused.json()["code"]) == (403, "sync_disabled")


async def test_a_user_has_so_many_connections_and_no_more(house: Open) -> None:
    async with house(user_readers=1) as home, nudged(home.client) as first:
        await first.opened()
        async with nudged(home.client) as second:
            await second.closed()
            assert (second.cursors, second.retry_ms >= 1000) == ([], True)


async def test_a_device_needs_no_header_to_follow_an_answer_that_an_exchange_names(database: str) -> None:
    async with demo_provider() as demo, serving_users(database) as client:
        await apply_demo(database, demo, {"slow": "demo?delay_ms=20&tokens=100000"})
        said = {"chatbot_id": "slow", "message_text": "Hello"}
        await client.post("/api/process-message", json=said, headers=as_user("ann"))
        seen = (await client.get("/api/chat/sync", headers=as_user("ann"))).json()
        (stream,) = seen["active_streams"]
        page = await client.get(stream["streaming_url"])
        assert page.json()["events"][0]["event"] == "stream_start"
        assert (await client.get(stream["streaming_url"].partition("?")[0])).status_code == 401
        assert "active_streams" not in (await client.get("/api/chat/sync", headers=as_user("bob"))).json()
