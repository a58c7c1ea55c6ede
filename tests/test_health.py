"""What load balancers are told: serving, without a database, and when it comes (P9)."""

import asyncio
import re
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from time import monotonic
from urllib.parse import parse_qs, urlsplit

import asyncpg
import httpx2
import pytest

from app import __version__
from app.server import gateway
from app.settings import load
from tests.serving import client_of, serving, until_ready
from tests.wire import Wire

_QUESTION = {"user_id": "ann", "chatbot_id": "demo", "message_text": "Hello"}


class Absent:
    """A PostgreSQL that refuses connections, until `appear`."""

    def __init__(self, dsn: str) -> None:
        url = urlsplit(dsn)
        query = parse_qs(url.query)
        path = f"{query['host'][0]}/.s.PGSQL.{query['port'][0]}"
        self._wire = Wire(lambda: asyncio.open_unix_connection(path))
        # Bound but not listening: the kernel refuses, and nobody else gets the port meanwhile.
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        port = self._listener.getsockname()[1]
        self.dsn = f"postgresql://{url.username}@127.0.0.1:{port}{url.path}?sslmode=disable"
        self._server: asyncio.Server | None = None

    async def appear(self) -> None:
        self._server = await asyncio.start_server(self._wire.accept, sock=self._listener)

    def vanish(self) -> None:
        """Break every connection and refuse new ones."""
        if self._server is not None:
            self._server.close()
        self._listener.close()
        self._wire.end()


@pytest.fixture
async def absent(database: str) -> AsyncGenerator[Absent, None]:
    absent = Absent(database)
    yield absent
    absent.vanish()


@asynccontextmanager
async def _starting(dsn: str) -> AsyncGenerator[httpx2.AsyncClient, None]:
    """A gateway that nobody waits for to be ready."""
    async with gateway(load(database_url=dsn, port=0, drain_s=0, auth="open")) as url, client_of(url) as client:
        yield client


async def _check_away(client: httpx2.AsyncClient) -> None:
    assert (await client.get("/livez")).status_code == 200
    assert (await client.get("/readyz")).status_code == 503
    health = await client.get("/api/conversation-health")
    assert health.status_code == 503
    assert health.json()["status"] == "unhealthy"
    assert health.json()["database"] == "disconnected"
    began = monotonic()
    refused = await client.post("/api/process-message", json=_QUESTION)
    assert monotonic() - began < 2
    assert refused.status_code == 503
    assert refused.headers["content-type"] == "application/problem+json"
    assert int(refused.headers["retry-after"]) >= 1
    stream = "0197c1a2-7b3c-7def-8a01-23456789abcd"
    for url in (f"/api/stream-events/{stream}", f"/api/stream?streams={stream}"):
        reader = await client.get(url, headers={"Accept": "text/event-stream"})
        assert (reader.status_code, reader.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        assert re.fullmatch(r"retry: \d+\n", reader.text)
    page = await client.get(f"/api/stream-events/{stream}")
    assert page.status_code == 503
    assert int(page.headers["retry-after"]) >= 1


async def test_serving(database: str) -> None:
    async with serving(database) as client:
        health = (await client.get("/api/conversation-health")).json()
        assert health.pop("timestamp").endswith("Z")
        assert health == {"status": "healthy", "database": "connected", "active_streams": 0}
        assert (await client.get("/livez")).json() == {"status": "alive"}
        assert (await client.get("/readyz")).json() == {"status": "ready"}
        verbose = (await client.get("/readyz?verbose")).json()
        assert verbose["version"] == __version__
        assert verbose["refusal"] is None
        for path in ("/livez", "/readyz", "/api/conversation-health"):
            assert (await client.get(path)).headers["cache-control"] == "no-store"


async def test_started_before_the_database(absent: Absent) -> None:
    async with _starting(absent.dsn) as client:
        await _check_away(client)
        verbose = (await client.get("/readyz?verbose")).json()
        assert verbose["database"] == "disconnected"
        assert verbose["refusal"]
        await absent.appear()
        async with asyncio.timeout(5):
            await until_ready(client)
        assert (await client.get("/api/conversation-health")).json()["status"] == "healthy"
        assert (await client.post("/api/process-message", json=_QUESTION)).json()["code"] == "chatbot_unknown"


async def test_the_database_goes_away(absent: Absent) -> None:
    await absent.appear()
    async with _starting(absent.dsn) as client:
        await until_ready(client)
        absent.vanish()
        async with asyncio.timeout(10):
            while (await client.get("/api/conversation-health")).json()["database"] == "connected":
                await asyncio.sleep(0.02)
        await _check_away(client)


async def test_metrics_are_served_without_a_database(absent: Absent) -> None:
    async with _starting(absent.dsn) as client:
        response = await client.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain")
        assert "parley_active_streams 0.0" in response.text


async def test_a_failing_job_is_degraded_but_serving(database: str) -> None:
    connection = await asyncpg.connect(database)
    async with serving(database) as client:

        async def until(status: str) -> httpx2.Response:
            async with asyncio.timeout(10):
                while (response := await client.get("/api/conversation-health")).json()["status"] != status:
                    await asyncio.sleep(0.02)
            return response

        await connection.execute("alter table error_logs rename to away")
        await client.get("/api/chats/nothing-here", params={"user_id": "ann"})
        assert (await until("degraded")).status_code == 200
        assert (await client.get("/readyz?verbose")).json()["failing"] == ["journal"]
        await connection.execute("alter table away rename to error_logs")
        await until("healthy")
    await connection.close()
