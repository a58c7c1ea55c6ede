"""A device that follows the changes of its user's chats, and what it was told."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import orjson

_SSE = {"Accept": "text/event-stream"}
_PATIENCE_S = 10


class Nudged:
    """One connection. `cursors` are those of its `changed` frames, in their order."""

    def __init__(self, client: httpx2.AsyncClient, params: dict[str, str], headers: dict[str, str]) -> None:
        self.status = 0
        self.cursors: list[str] = []
        self.replaced = False
        self.retry_ms = 0
        self.body = b""
        self._news = asyncio.Event()
        self._reading = asyncio.create_task(self._read(client, params, headers))

    async def _read(self, client: httpx2.AsyncClient, params: dict[str, str], headers: dict[str, str]) -> None:
        url = "/api/chat/sync/events"
        try:
            async with client.stream("GET", url, params=params, headers=_SSE | headers, timeout=60) as response:
                self.status = response.status_code
                self._news.set()
                async for data in response.aiter_raw():
                    self.body += data
                    *blocks, _ = self.body.split(b"\n\n")
                    self._see([_fields(block) for block in blocks])
                if not self.body.endswith(b"\n\n"):
                    self.retry_ms = int(_fields(self.body).get("retry", 0))
        finally:
            self._news.set()

    def _see(self, frames: list[dict[str, str]]) -> None:
        changed = [frame for frame in frames if frame["event"] == "changed"]
        self.cursors = [frame["id"] for frame in changed]
        assert self.cursors == [orjson.loads(frame["data"])["cursor"] for frame in changed]
        self.replaced = any(frame["event"] == "replaced" for frame in frames)
        self.retry_ms = int(frames[-1].get("retry", 0)) if frames else 0
        self._news.set()

    async def until(self, true: Callable[["Nudged"], Any]) -> None:
        """Wait for something to be true of it."""
        async with asyncio.timeout(_PATIENCE_S):
            while not true(self):
                assert not self._reading.done(), f"closed after {self.body!r}"
                self._news.clear()
                await self._news.wait()

    async def reached(self, cursor: str) -> None:
        await self.until(lambda one: one.cursors[-1:] == [cursor])

    async def opened(self) -> None:
        """Wait until the server has answered: it follows from then on."""
        await self.until(lambda one: one.body)

    async def closed(self) -> None:
        """Wait until the server has closed it by itself."""
        await asyncio.wait_for(asyncio.shield(self._reading), _PATIENCE_S)

    async def leave(self) -> None:
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)


def _fields(block: bytes) -> dict[str, str]:
    """Of a frame, or of what stands behind the last one."""
    lines = [line for line in block.decode().rpartition("\n\n")[2].split("\n") if line and not line.startswith(":")]
    return dict(line.split(": ", 1) for line in lines)


@asynccontextmanager
async def nudged(
    server: httpx2.AsyncClient, user: str | None = "ann", *, headers: dict[str, str] | None = None, **params: str
) -> AsyncGenerator[Nudged, None]:
    named = params if user is None else {"user_id": user, **params}
    one = Nudged(server, named, headers or {})
    try:
        yield one
    finally:
        await one.leave()
