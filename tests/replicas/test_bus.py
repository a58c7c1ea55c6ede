"""Readers on another replica than the one that writes: prompt by the bus, and not much later without it."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import Any

import asyncpg
import httpx2
import pytest

from app.demo import demo_provider
from tests.proxy import proxy_to_postgres
from tests.reader import assert_whole
from tests.replicas.test_kill import Replica, listening, replicas
from tests.serving import apply_demo, until_ready
from tests.sse import frames

MODELS = {
    "short": "demo?delay_ms=20&tokens=100",
    "long": "demo?delay_ms=50&tokens=340",
}
NO_POLLING = {"PARLEY_POLL_S": "600"}
# A lease that nobody misses on a busy machine, and the default way of polling.
CALM = {"PARLEY_LEASE_S": "20", "PARLEY_POLL_S": "1"}


class Late:
    """A reader, and how long after its writing each event came, in seconds."""

    def __init__(self, replica: Replica, url: str) -> None:
        self.events: list[dict[str, Any]] = []
        self.lags: list[float] = []
        self.task = asyncio.ensure_future(self._read(replica.client, url))

    async def _read(self, client: httpx2.AsyncClient, url: str) -> None:
        async with client.stream("GET", url, headers={"Accept": "text/event-stream"}) as response:
            async for frame in frames(response):
                self.events.append(frame.data)
                written = datetime.fromisoformat(frame.data["timestamp"])
                self.lags.append((datetime.now(UTC) - written).total_seconds())

    async def has(self, count: int) -> None:
        async with asyncio.timeout(30):
            while len(self.events) < count:
                await asyncio.sleep(0.01)

    async def end(self) -> list[dict[str, Any]]:
        await asyncio.wait_for(self.task, 40)
        return self.events


@pytest.fixture(autouse=True)
async def demo(database: str) -> AsyncGenerator[str, None]:
    async with demo_provider() as url:
        await apply_demo(database, url, MODELS)
        yield url


async def test_events_reach_another_replicas_readers_at_once(database: str) -> None:
    async with replicas(database, 2, **CALM | NO_POLLING) as (writing, reading):
        accepted = [await writing.ask("short") for _ in range(3)]
        readers = [Late(one, answer["streaming_url"]) for answer in accepted for one in (reading, reading, writing)]
        for reader in readers:
            assert_whole(await reader.end(), "completed")
        assert max(lag for reader in readers for lag in reader.lags[1:]) < 1


async def test_a_waiting_messages_turn_is_heard_of_elsewhere(database: str) -> None:
    async with replicas(database, 2, **CALM | NO_POLLING) as (writing, reading):
        first = await writing.ask("short", session_id="chat")
        waiting = await writing.ask("short", session_id="chat")
        assert waiting["status"] == "queued"
        reader = Late(reading, waiting["streaming_url"])
        assert_whole(await Late(writing, first["streaming_url"]).end(), "completed")
        assert_whole(await reader.end(), "completed")


async def test_d4_a_hiccup_when_the_server_ends_every_connection(database: str) -> None:
    async with replicas(database, 2, **CALM | NO_POLLING) as (writing, reading):
        accepted = await writing.ask("short")
        reader = Late(reading, accepted["streaming_url"])
        await reader.has(10)
        look = await asyncpg.connect(database)
        await look.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity"
            " where datname = current_database() and pid <> pg_backend_pid()"
        )
        await look.close()
        assert_whole(await reader.end(), "completed")
        assert max(reader.lags) < 2


async def test_d5_polling_goes_on_while_notifications_are_swallowed(database: str) -> None:
    async with proxy_to_postgres(database) as (proxy, dsn), AsyncExitStack() as stack:
        writing = await stack.enter_async_context(listening(database, **CALM))
        reading = await stack.enter_async_context(listening(database, **CALM, PARLEY_LISTEN_URL=dsn))
        await until_ready(writing.client)
        await until_ready(reading.client)
        accepted = await writing.ask("long")
        reader = Late(reading, accepted["streaming_url"])
        await reader.has(10)
        proxy.stall()
        await _until(reading, "degraded")
        verbose = (await reading.client.get("/readyz?verbose")).json()
        assert verbose["failing"] == ["listener"]
        assert (verbose["bus"]["kind"], verbose["bus"]["listening"]) == ("notify", False)
        proxy.open()
        await _until(reading, "healthy")
        assert_whole(await reader.end(), "completed")
        assert max(reader.lags) < 2.5


async def _until(replica: Replica, status: str) -> None:
    async with asyncio.timeout(20):
        while (await replica.client.get("/api/conversation-health")).json()["status"] != status:
            await asyncio.sleep(0.05)


async def test_two_replicas_without_a_bus_poll(database: str) -> None:
    async with replicas(database, 2, **CALM | {"PARLEY_BUS": "poll", "PARLEY_POLL_S": "0.2"}) as (writing, reading):
        accepted = await writing.ask("short")
        assert_whole(await Late(reading, accepted["streaming_url"]).end(), "completed")
        assert (await reading.client.get("/readyz?verbose")).json()["bus"] == {"kind": "poll"}
