"""Many at once, or too much for the database: everybody is served or told when to come back, and health answers."""

import asyncio
import gc
import re
import socket
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from time import monotonic

import asyncpg
import httpx2
import pytest

from app.demo import demo_provider
from app.gateway.presence import Life
from app.server import gateway
from app.settings import load
from tests.house import House, Open
from tests.reader import assert_whole
from tests.serving import apply_demo, client_of, until_ready
from tests.sse import read_stream

SSE = b"GET %s HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: text/event-stream\r\n\r\n"
MODELS = {"mute": "demo?fault=silent", "flood": "demo?delay_ms=0&tokens=20000"}
UNKNOWN = "/api/stream-events/0197c1a2-7b3c-7def-8a01-23456789abcd"


@asynccontextmanager
async def watched(home: House, *, within_s: float) -> AsyncGenerator[None, None]:
    """While the block runs health is asked all the time, and serves for most of it.

    Not all of it: a probe of the database may take a second at most, and the machine may be busy with something else.
    """
    served_s = missed_s = 0.0

    async def ask(client: httpx2.AsyncClient) -> None:
        nonlocal served_s, missed_s
        while True:
            for path in ("/api/conversation-health", "/readyz", "/livez"):
                began = monotonic()
                served = (await client.get(path)).status_code == 200
                took = monotonic() - began
                if served and took < within_s:
                    served_s += took
                else:
                    missed_s += took

    # A client of its own: the connections of one are bounded, too.
    async with client_of(str(home.client.base_url)) as client:
        asking = asyncio.ensure_future(ask(client))
        try:
            yield
        finally:
            asking.cancel()
            await asyncio.wait([asking])
    if not asking.cancelled():
        asking.result()
    assert served_s > 2 * missed_s


async def test_health_answers_while_everybody_waits_for_locks(house: Open, database: str) -> None:
    """Slow queries hold the whole pool: whoever needs it is told so, and this replica stays alive to the others."""
    async with house(MODELS, pool_size=6) as home:
        url = (await home.post("mute")).json()["streaming_url"]
        counted = await home.count("streaming_sessions")
        blocker = await asyncpg.connect(database)
        async with watched(home, within_s=2), client_of(str(home.client.base_url)) as client:
            await blocker.execute("begin; lock table streaming_sessions in access exclusive mode")
            body = {"user_id": "ann", "chatbot_id": "mute", "message_text": "Hello"}
            # Waiting for its turn and for locks, each with an end, may add up to more than the client's patience.
            posts = [client.post("/api/process-message", json=body, timeout=30) for _ in range(30)]
            pages = [client.get(UNKNOWN) for _ in range(30)]
            streams = [client.get(UNKNOWN, headers={"Accept": "text/event-stream"}) for _ in range(30)]
            answers = await asyncio.gather(*posts, *pages, *streams)
            # What runs here is read without the table that is locked.
            assert (await client.get(url)).json()["session_status"] == "active"
            await blocker.execute("rollback")
        await blocker.close()
        for answer in answers[:60]:
            assert answer.status_code == 503, answer.text
            assert int(answer.headers["retry-after"]) >= 1
        for answer in answers[60:]:
            assert answer.status_code == 200
            assert answer.text.startswith("retry: ")
            assert answer.text.count("\n") == 1
        assert await home.count("streaming_sessions") == counted
        assert await home.count("replicas where alive") == await home.count("replicas") == 1
        assert (await home.post("mute")).status_code == 200


class Raw:
    """One SSE connection without a client library in between."""

    def __init__(self, home: House, url: str) -> None:
        self._home = home
        self._writer: asyncio.StreamWriter | None = None
        self._url = url

    async def first_event(self) -> bytes:
        """Connect; the first frame, or the line that says when to come back."""
        reader, writer = await asyncio.open_connection(self._home.client.base_url.host, self._home.client.base_url.port)
        self._writer = writer
        writer.write(SSE % self._url.encode())
        await reader.readuntil(b"\r\n\r\n")
        return await reader.readuntil(b"data: ")

    async def leave(self) -> None:
        """Without a word."""
        if self._writer is None:
            return
        self._writer.transport.abort()
        self._writer.close()
        with suppress(ConnectionError):
            await self._writer.wait_closed()


async def test_k2_readers_who_come_back_all_at_once_are_all_served(house: Open) -> None:
    async with house(MODELS, stream_readers=1000, user_readers=1000) as home:
        urls = [(await home.post("mute")).json()["streaming_url"] for _ in range(5)]
        _, finished = await home.ask()
        urls.append(f"/api/stream-events/{finished[0].stream}")
        readers = [Raw(home, url) for url in urls * 50]
        # How soon is the benchmark's to say: here readers and gateway share one loop.
        async with AsyncExitStack() as leaving, watched(home, within_s=10), asyncio.timeout(30):
            for reader in readers:
                leaving.push_async_callback(reader.leave)
            frames = await asyncio.gather(*(reader.first_event() for reader in readers))
        assert Counter(b"event: stream_start" in frame for frame in frames) == {True: 300}


async def test_k4_a_slow_reader_of_loud_streams_gets_each_event_once(house: Open) -> None:
    async with house({"flood": "demo?delay_ms=0&tokens=5000"}, reader_events=16, flush_events=50) as home:
        streams = [(await home.post("flood")).json()["streaming_session_id"] for _ in range(2)]
        narrow = socket.socket()
        narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        narrow.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(narrow, (home.client.base_url.host, home.client.base_url.port))
        reader, writer = await asyncio.open_connection(sock=narrow, limit=2048)
        writer.write(b"GET /api/stream?streams=%s HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n" % ",".join(streams).encode())
        got = b""
        while data := await reader.read(1024):
            got += data
        writer.close()
        for stream in streams:
            ids = [int(number) for number in re.findall(rf"^id: {stream}:(\d+)".encode(), got, re.MULTILINE)]
            assert ids == list(range(1, len(ids) + 1))
            assert len(ids) > 5000
        assert got.count(b"\nevent: stream_end\n") == 2
        assert "parley_events_lost_total 0.0" in (await home.client.get("/metrics")).text


async def test_g13_a_server_that_drains_is_read_from_and_takes_nothing_new(database: str) -> None:
    life = Life()
    async with demo_provider() as demo:
        await apply_demo(database, demo, {"slow": "demo?delay_ms=20&tokens=50"})
        async with gateway(load(database_url=database, port=0, auth="open"), life) as url, client_of(url) as client:
            await until_ready(client)
            body = {"user_id": "ann", "chatbot_id": "slow", "message_text": "Hello"}
            stream = (await client.post("/api/process-message", json=body)).json()["streaming_session_id"]
            life.leave.set()
            while (await client.get("/readyz")).status_code == 200:
                pass
            refused = await client.post("/api/process-message", json=body)
            assert (refused.status_code, refused.json()["code"]) == (503, "draining")
            assert int(refused.headers["retry-after"]) >= 1
            frames = await read_stream(client, f"/api/stream-events/{stream}")
    assert_whole([frame.data for frame in frames], "completed")
    connection = await asyncpg.connect(database)
    assert await connection.fetchval("select count(*) from messages where role = 'user'") == 1
    await connection.close()


def _memory_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / (1 << 20)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory from /proc")
async def test_g10_a_thousand_connects_and_disconnects_leave_nothing_behind(house: Open) -> None:
    async with house(MODELS) as home:
        urls = [(await home.post("mute")).json()["streaming_url"] for _ in range(5)]
        several = f"/api/stream?streams={','.join(url[-36:] for url in urls)}"
        memory = []
        for _ in range(20):
            readers = [Raw(home, url) for url in (*urls, several) * 8 + (several,) * 2]
            await asyncio.gather(*(reader.first_event() for reader in readers))
            for reader in readers:
                await reader.leave()
            async with asyncio.timeout(10):
                while "parley_readers 0.0" not in (await home.client.get("/metrics")).text:
                    pass
            gc.collect()
            memory.append(_memory_mb())
        assert [task for task in asyncio.all_tasks() if "_pump" in repr(task) or "_left" in repr(task)] == []
        assert memory[-1] - memory[len(memory) // 2] < 4
