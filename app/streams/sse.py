"""Server-sent events on the wire: a response that frames cross with as little as possible in between.

docs/decisions/0004 says why it is ours.
"""

import asyncio
import random
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager

import structlog
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

log = structlog.get_logger(__name__)

# One newline, no blank line: a blank line dispatches an event, and one popular client shows it as an empty message.
HEARTBEAT = b": hb\n"
HEADERS = {"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no"}
_MEDIA_TYPE = "text/event-stream"


class EventStream(StreamingResponse):
    """Sends whole frames as they come, heartbeats in between, and frees a reader that left or takes nothing.

    `frames` is closed whatever ends the response; a HEAD request never starts it.
    """

    def __init__(self, frames: AsyncGenerator[bytes, None], *, heartbeat_s: float, send_timeout_s: float) -> None:
        super().__init__(frames, headers=HEADERS, media_type=_MEDIA_TYPE)
        self._frames = frames
        self._heartbeat_s = heartbeat_s
        self._send_timeout_s = send_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        line = _Line(send, self._heartbeat_s, self._send_timeout_s)
        async with aclosing(self._frames), line.held(receive):
            await line.open(self.raw_headers)
            if scope["method"] != "HEAD":
                async for frames in self._frames:
                    await line.write(frames)
            await line.write(b"", more=False)


class _Line:
    """The way to one reader. Besides the response's own task it costs one that waits for the reader to leave, and one
    timer that is moved only when it fires."""

    def __init__(self, send: Send, heartbeat_s: float, send_timeout_s: float) -> None:
        self._send = send
        self._heartbeat_s = heartbeat_s
        self._send_timeout_s = send_timeout_s
        self._loop = asyncio.get_running_loop()
        self._block = asyncio.timeout(None)
        self._written = self._loop.time()
        # Since when a write has been waiting for the reader to take what was written before.
        self._waiting: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._beat: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def held(self, receive: Receive) -> AsyncGenerator[None, None]:
        """Run the block until it ends, but no longer than the reader stays and takes what it is sent."""
        leaving = self._loop.create_task(self._left(receive))
        try:
            async with self._block:
                yield
        except TimeoutError:
            if not self._block.expired():
                raise
        finally:
            for waiting in (leaving, self._beat, self._timer):
                if waiting is not None:
                    waiting.cancel()

    async def _left(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._end()

    def _end(self) -> None:
        if not self._block.expired():  # once is enough
            self._block.reschedule(0)

    async def open(self, headers: list[tuple[bytes, bytes]]) -> None:
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        self._timer = self._loop.call_later(self._heartbeat_s, self._look)

    async def write(self, data: bytes, *, more: bool = True) -> None:
        if self._waiting is None:
            self._waiting = self._loop.time()
        await self._send({"type": "http.response.body", "body": data, "more_body": more})
        self._waiting = None
        self._written = self._loop.time()

    def _look(self) -> None:
        """Beat after enough silence; give up on a reader that has let a write wait for too long."""
        now = self._loop.time()
        if self._waiting is not None:
            due = self._waiting + self._send_timeout_s
            if due <= now:
                log.info("reader_stuck", waited_s=self._send_timeout_s)
                self._end()
                return
        else:
            due = self._written + self._heartbeat_s
            if due <= now:
                self._beat = self._loop.create_task(self.write(HEARTBEAT))
                due = now + self._heartbeat_s
        self._timer = self._loop.call_at(due, self._look)


def retry_line(ms: int) -> bytes:
    """The reconnection time, jittered by half so that many readers do not come back at once. Never sent alone with a
    blank line: it goes in front of a frame, or is the last line before a close."""
    return b"retry: %d\n" % (ms + random.randint(0, ms // 2))


def come_back_later(ms: int) -> Response:
    """What an EventSource gets instead of a 503, after which browsers would give up for ever (G14)."""
    return Response(retry_line(ms), media_type=_MEDIA_TYPE, headers=HEADERS)
