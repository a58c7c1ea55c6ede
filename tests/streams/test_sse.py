"""The response that carries frames: heartbeats, and whatever ends it closes the generator and leaves nothing behind."""

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from time import monotonic
from urllib.parse import urlsplit

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import Message

from app.server import serving
from app.streams.sse import HEARTBEAT, EventStream

FRAME = b"id: 1\nevent: token\ndata: {}\n\n"
# More than the kernel and the server keep for a reader that takes nothing.
FLOOD = bytes(32 * 1024 * 1024)
NEVER_S = 60.0
SOON_S = 10
Frames = AsyncGenerator[bytes, None]


class Source:
    """Frames to send, then silence until `go_on`, then perhaps an error."""

    def __init__(self, *frames: bytes, error: Exception | None = None) -> None:
        self.go_on = asyncio.Event()
        self.started = asyncio.Event()
        self.closed = asyncio.Event()
        self._given = frames
        self._error = error

    def frames(self) -> Frames:
        self._kept = self._frames()  # else it would be closed for want of references
        return self._kept

    async def _frames(self) -> Frames:
        self.started.set()
        try:
            for frame in self._given:
                yield frame
            await self.go_on.wait()
            if self._error is not None:
                raise self._error
        finally:
            self.closed.set()


@asynccontextmanager
async def served(
    frames: Callable[[], Frames], *, heartbeat_s: float = NEVER_S, send_timeout_s: float = NEVER_S
) -> AsyncIterator[str]:
    async def endpoint(_: Request) -> EventStream:
        return EventStream(frames(), heartbeat_s=heartbeat_s, send_timeout_s=send_timeout_s)

    async with serving(Starlette(routes=[Route("/", endpoint)]), "127.0.0.1", 0) as url:
        yield url


@asynccontextmanager
async def reader(url: str, method: str = "GET") -> AsyncIterator[asyncio.StreamReader]:
    """A connection with its request sent. It takes some 2 KiB more from the network than the test reads."""
    incoming, outgoing = await asyncio.open_connection(urlsplit(url).hostname, urlsplit(url).port, limit=1024)
    try:
        outgoing.write(f"{method} / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        yield incoming
    finally:
        outgoing.transport.abort()


async def head_of(incoming: asyncio.StreamReader) -> list[bytes]:
    return (await incoming.readuntil(b"\r\n\r\n")).splitlines()


async def chunk_of(incoming: asyncio.StreamReader) -> bytes:
    size = int(await incoming.readuntil(b"\r\n"), 16)
    return (await incoming.readexactly(size + 2))[:-2]


# -- what is sent


async def test_heartbeats_come_in_silence_each_as_a_line_of_its_own() -> None:
    source = Source(FRAME)
    async with served(source.frames, heartbeat_s=0.1) as url, reader(url) as incoming:
        await head_of(incoming)
        assert await chunk_of(incoming) == FRAME
        came = [monotonic()]
        for _ in range(3):
            assert await chunk_of(incoming) == HEARTBEAT
            came.append(monotonic())
        assert all(0.05 < later - earlier < 1 for earlier, later in pairwise(came))
        source.go_on.set()
        assert await chunk_of(incoming) == b""


async def test_frames_put_the_heartbeat_off() -> None:
    async def frames() -> Frames:
        for _ in range(20):
            await asyncio.sleep(0.02)
            yield FRAME
        await asyncio.Event().wait()

    async with served(frames, heartbeat_s=0.3) as url, reader(url) as incoming:
        await head_of(incoming)
        for _ in range(20):
            assert await chunk_of(incoming) == FRAME
        last = monotonic()
        assert await chunk_of(incoming) == HEARTBEAT
        assert monotonic() - last > 0.2


async def test_head_gets_the_headers_at_once_and_starts_no_frames() -> None:
    source = Source(FRAME)
    async with served(source.frames) as url:
        async with reader(url, "HEAD") as incoming, asyncio.timeout(SOON_S):
            head = await head_of(incoming)
            assert await incoming.read() == b""
        assert not source.started.is_set()
        async with reader(url) as incoming:
            whole = await head_of(incoming)
    assert b"content-type: text/event-stream; charset=utf-8" in head
    assert [line for line in whole if line not in head and not line.startswith(b"date")] == [
        b"transfer-encoding: chunked"
    ]


# -- what ends it


async def test_the_end_of_the_frames_ends_the_response() -> None:
    source = Source(FRAME)
    source.go_on.set()
    async with served(source.frames) as url, reader(url) as incoming:
        await head_of(incoming)
        assert [await chunk_of(incoming) for _ in range(2)] == [FRAME, b""]
        assert source.closed.is_set()


async def test_a_disconnect_closes_the_frames_at_once() -> None:
    source = Source(FRAME)
    async with served(source.frames) as url:
        async with reader(url) as incoming:
            await head_of(incoming)
            await chunk_of(incoming)
            assert not source.closed.is_set()
        async with asyncio.timeout(1):
            await source.closed.wait()


async def test_a_disconnect_frees_also_a_send_that_waits() -> None:
    source = Source(FLOOD, FRAME)
    async with served(source.frames) as url:
        async with reader(url) as incoming:
            await head_of(incoming)
        async with asyncio.timeout(1):
            await source.closed.wait()


@pytest.mark.parametrize("frames", [(FLOOD, FRAME), (FLOOD,)], ids=["frame waits", "heartbeat waits"])
async def test_a_reader_that_takes_nothing_is_freed_within_heartbeat_and_send_timeout(frames: tuple[bytes]) -> None:
    source = Source(*frames)
    async with served(source.frames, heartbeat_s=0.2, send_timeout_s=0.4) as url, reader(url) as incoming:
        await head_of(incoming)
        began = monotonic()
        async with asyncio.timeout(SOON_S):
            await source.closed.wait()
        assert 0.35 < monotonic() - began < 2


async def test_a_slow_reader_that_takes_something_stays() -> None:
    """The send timeout is of one send, and each goes on as soon as there is room again."""

    async def frames() -> Frames:
        for _ in range(8):
            yield bytes(4 * 1024 * 1024)

    async with served(frames, heartbeat_s=0.05, send_timeout_s=1) as url, reader(url) as incoming:
        await head_of(incoming)
        read = 0
        while data := await incoming.read(65536):
            read += len(data)
        assert read > 32 * 1024 * 1024


async def test_an_error_closes_the_frames_and_cuts_the_response_off() -> None:
    source = Source(FRAME, error=RuntimeError("a bug"))
    source.go_on.set()
    async with served(source.frames) as url, reader(url) as incoming:
        await head_of(incoming)
        assert await chunk_of(incoming) == FRAME
        assert await incoming.read() == b""
        assert source.closed.is_set()


async def answered(source: Source, leave: asyncio.Event | None = None) -> None:
    """The response to a reader that stays until `leave`, without a server around it."""

    async def receive() -> Message:
        await (leave or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        assert message["type"] in ("http.response.start", "http.response.body")

    response = EventStream(source.frames(), heartbeat_s=NEVER_S, send_timeout_s=NEVER_S)
    await response({"type": "http", "method": "GET"}, receive, send)


async def test_a_disconnect_is_no_error() -> None:
    source, leave = Source(FRAME), asyncio.Event()
    task = asyncio.ensure_future(answered(source, leave))
    await source.started.wait()
    leave.set()
    await task
    assert source.closed.is_set()


@pytest.mark.parametrize("error", [RuntimeError("a bug"), TimeoutError("a bug")], ids=type)
async def test_an_error_gets_out_as_it_is(error: Exception) -> None:
    source = Source(FRAME, error=error)
    source.go_on.set()
    with pytest.raises(type(error), match="a bug"):
        await answered(source)


async def test_cancelling_closes_the_frames_and_is_not_swallowed() -> None:
    source = Source(FRAME)
    before = asyncio.all_tasks()
    task = asyncio.ensure_future(answered(source))
    await source.started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert source.closed.is_set()
    await until(lambda: asyncio.all_tasks() == before)


# -- what is left


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(SOON_S):
        while not true():
            await asyncio.sleep(0)


async def test_g10_a_thousand_readers_leave_no_task_and_no_connection() -> None:
    """Half of them stay to the end, half leave in the middle, with heartbeats and stuck sends among them."""
    open_now = 0

    async def frames() -> Frames:
        nonlocal open_now
        open_now += 1
        try:
            yield FRAME
            await asyncio.sleep(0.02)
            yield FRAME * 10_000
            yield FRAME
        finally:
            open_now -= 1

    async def one(url: str, number: int) -> None:
        async with reader(url) as incoming:
            await head_of(incoming)
            assert await chunk_of(incoming) == FRAME
            if number % 2:
                while await incoming.read(65536):
                    pass

    async with served(frames, heartbeat_s=0.01, send_timeout_s=0.05) as url:
        await one(url, 1)
        tasks, files = asyncio.all_tasks(), len(os.listdir("/proc/self/fd"))
        for start in range(0, 1000, 50):
            await asyncio.gather(*(one(url, start + number) for number in range(50)))
        await until(lambda: asyncio.all_tasks() == tasks and open_now == 0)
        await until(lambda: len(os.listdir("/proc/self/fd")) <= files)
