"""A reader of one answer that stays connected while a test does something to the servers."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import httpx2

from tests.sse import frames

PATIENCE_S = 30
Event = dict[str, Any]


class Reader:
    """What came so far, over one connection that was never cut."""

    def __init__(self, client: httpx2.AsyncClient, url: str, after: int) -> None:
        self.events: list[Event] = []
        # How often the server has said that it is there.
        self.beats = 0
        self._news = asyncio.Event()
        self._reading = asyncio.create_task(self._read(client, url, after))

    async def _read(self, client: httpx2.AsyncClient, url: str, after: int) -> None:
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
        async with client.stream("GET", url, headers=headers) as response:
            assert response.status_code == 200
            async for frame in frames(response, self._beat):
                self.events.append(frame.data)
                self._news.set()

    def _beat(self) -> None:
        self.beats += 1

    @property
    def closed(self) -> bool:
        return self._reading.done()

    async def has(self, count: int) -> None:
        """Wait until so many events came."""
        await self.has_or_ended(count)
        assert len(self.events) >= count, f"closed after {self.events}"

    async def has_or_ended(self, count: int) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while len(self.events) < count and not self._reading.done():
                self._news.clear()
                waiting = asyncio.ensure_future(self._news.wait())
                await asyncio.wait({waiting, self._reading}, return_when=asyncio.FIRST_COMPLETED)
                waiting.cancel()

    async def end(self) -> list[Event]:
        """Everything, once the server has closed the connection by itself."""
        await asyncio.wait_for(asyncio.shield(self._reading), PATIENCE_S)
        return self.events

    async def leave(self) -> None:
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)


@asynccontextmanager
async def reading(client: httpx2.AsyncClient, url: str, *, after: int = 0) -> AsyncGenerator[Reader, None]:
    reader = Reader(client, url, after)
    try:
        yield reader
    finally:
        await reader.leave()


async def poll(client: httpx2.AsyncClient, url: str) -> list[Event]:
    """Every event of a stream by long polls, until there is nothing more."""
    events: list[Event] = []
    async with asyncio.timeout(PATIENCE_S):
        while True:
            page = (await client.get(url, params={"after": len(events), "wait": 5}, timeout=15)).json()
            events += page["events"]
            if not page["has_more"]:
                return events


async def ask(client: httpx2.AsyncClient, chatbot: str, **fields: Any) -> dict[str, Any]:
    """Send a message; what the server accepted."""
    body = {"user_id": "ann", "chatbot_id": chatbot, "message_text": "Hello", **fields}
    response = await client.post("/api/process-message", json=body)
    assert response.status_code == 200, response.text
    accepted: dict[str, Any] = response.json()
    return accepted


def assert_whole(events: list[Event], status: str, *, error: str | None = None) -> None:
    """Ids 1..n, one beginning, one end of this kind, and nothing after it."""
    assert [event["id"] for event in events] == list(range(1, len(events) + 1))
    kinds = [event["event"] for event in events]
    assert (kinds[0], kinds.count("stream_start")) == ("stream_start", 1)
    assert (kinds[-1], kinds.count("stream_end")) == ("stream_end", 1)
    end = events[-1]["data"]
    assert (end["status"], end.get("error", {}).get("code")) == (status, error)


def text_of(events: list[Event]) -> str:
    """What a reader that obeys flow_restart has on its screen, of an answer of one flow."""
    pieces: list[str] = []
    for event in events:
        if event["event"] == "flow_restart":
            pieces.clear()
        elif event["event"] == "token":
            pieces.append(event["data"]["token"])
    return "".join(pieces)


def restarts(events: list[Event]) -> list[str]:
    """Why flows were begun again."""
    return [event["data"]["reason"] for event in events if event["event"] == "flow_restart"]
