"""Devices of one user at two replicas: what is written at one is heard of and followed live at the other."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from app.demo import demo_provider
from tests.reader import assert_whole, reading, text_of
from tests.replicas.test_kill import replicas
from tests.serving import apply_demo
from tests.sync.nudged import nudged
from tests.sync.test_gateway import sync

# Nothing but the bus tells of anything, and nobody misses a lease.
_DEAF = {"PARLEY_POLL_S": "600", "PARLEY_LEASE_S": "20"}


@pytest.fixture(autouse=True)
async def demo(database: str) -> AsyncGenerator[None, None]:
    async with demo_provider() as url:
        await apply_demo(database, url, {"talks": "demo?delay_ms=20&tokens=120"})
        yield


async def test_a_second_device_follows_an_answer_from_its_first_token_on(database: str) -> None:
    async with replicas(database, 2, **_DEAF) as (asked, watching), AsyncExitStack() as stack:
        before = await sync(watching.client, "desk")
        desk = await stack.enter_async_context(nudged(watching.client))
        await desk.reached(before["cursor"])
        accepted = await asked.ask("talks", session_id="trip", client_message_id="q1", message_text="Where to?")
        await desk.until(lambda one: one.cursors[-1] != before["cursor"])
        seen = await sync(watching.client, "desk", cursor=before["cursor"])
        assert [message["id"] for message in seen["messages"]] == ["q1"], "the answer is not there yet"
        (stream,) = seen["active_streams"]
        assert (stream["chat_id"], stream["streaming_session_id"]) == ("trip", accepted["streaming_session_id"])
        cursor, url = stream["last_event_id"], stream["streaming_url"]
        assert (cursor >= 1, url) == (True, accepted["streaming_url"])
        async with reading(watching.client, url, after=cursor) as live, reading(asked.client, url) as own:
            await live.has(20)
            later = await sync(watching.client, "desk", cursor=seen["cursor"])
            assert (later["messages"], later["active_streams"][0]["last_event_id"] > cursor) == ([], True)
            past = (await watching.client.get(url, params={"limit": cursor})).json()["events"]
            followed = past + await live.end()
            assert followed == await own.end()
        assert_whole(followed, "completed")
        saved = next(event["data"]["message_id"] for event in followed if event["event"] == "message")
        pulled = await _until_idle(watching.client, seen["cursor"])
        assert [(one["id"], one["content"]) for one in pulled["messages"]] == [(saved, text_of(followed))]
        await desk.reached(pulled["cursor"])


async def _until_idle(client: Any, cursor: str) -> dict[str, Any]:
    async with asyncio.timeout(10):
        while "active_streams" in (pulled := await sync(client, "desk", cursor=cursor)):
            await asyncio.sleep(0.02)
    return pulled
