"""Three kinds of readers, each as clients are: an SSE client of our own, a poller, and a browser's EventSource.

None of them repairs anything: what comes is counted against the rule that ids go up by one.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import httpx2
import orjson

_TERMINAL = "stream_end"
# A replica that says nothing for so long, heartbeats included, is left for another; in seconds.
_SILENCE_S = 4
_AGAIN_S = 0.1

Event = dict[str, Any]
Pick = Callable[[], str]


class Seen:
    """What one reader has got of one stream, over all its connections."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.events: list[Event] = []
        self.lost = self.doubled = self.reordered = 0
        self.connections = 0
        # Answers that a reader inside of retention must never get.
        self.refusals: list[str] = []
        self.changed = asyncio.Event()

    @property
    def last(self) -> int:
        return max((event["id"] for event in self.events), default=0)

    @property
    def ended(self) -> bool:
        return bool(self.events) and self.events[-1]["event"] == _TERMINAL

    def take(self, event: Event) -> None:
        """Count what does not follow on what was there."""
        following = self.last + 1
        if event["id"] > following:
            self.lost += event["id"] - following
        elif event["id"] < following:
            known = any(event["id"] == seen["id"] for seen in self.events)
            self.doubled += known
            self.reordered += not known
            self.lost -= not known
        self.events.append(event)
        self.changed.set()

    async def has(self, count: int) -> None:
        """Return when so many events came, or it ended."""
        while len(self.events) < count and not self.ended:
            self.changed.clear()
            await self.changed.wait()


async def read_sse(seen: Seen, path: str, pick: Pick) -> None:
    """A client that comes back with Last-Event-ID as often as it takes, and asks once more behind the end."""
    while not seen.ended:
        try:
            await _connect(seen, path, pick())
        except (httpx2.HTTPError, TimeoutError):
            await asyncio.sleep(_AGAIN_S)


async def _connect(seen: Seen, path: str, origin: str) -> None:
    headers = {"Accept": "text/event-stream", "Last-Event-ID": str(seen.last)}
    async with (
        httpx2.AsyncClient(base_url=origin, trust_env=False, timeout=_SILENCE_S) as client,
        client.stream("GET", path, headers=headers) as response,
    ):
        seen.connections += 1
        if response.status_code != 200:
            _refused(seen, response)
            await asyncio.sleep(_AGAIN_S)
            return
        async for event in _events(response):
            seen.take(event)
    await asyncio.sleep(_AGAIN_S)


def _refused(seen: Seen, response: httpx2.Response) -> None:
    """A replica that is starting or leaving says 503; nothing else is in order before the end."""
    if response.status_code != 503:
        seen.refusals.append(f"{response.status_code} at {seen.last}")


async def _events(response: httpx2.Response) -> AsyncIterator[Event]:
    """Whole frames; one that was cut off in the middle is dropped, as the standard has it."""
    rest = b""
    async for data in response.aiter_raw():
        *frames, rest = (rest + data).split(b"\n\n")
        for frame in frames:
            lines = [line.removeprefix(b"data: ") for line in frame.split(b"\n") if line.startswith(b"data: ")]
            if lines:
                event: Event = orjson.loads(b"\n".join(lines))
                yield event


async def read_polling(seen: Seen, path: str, pick: Pick) -> None:
    """A client that asks another replica each time, with a short long poll."""
    more = True
    while more:
        try:
            more = await _poll(seen, path, pick())
        except (httpx2.HTTPError, TimeoutError):
            await asyncio.sleep(_AGAIN_S)


async def _poll(seen: Seen, path: str, origin: str) -> bool:
    async with httpx2.AsyncClient(base_url=origin, trust_env=False, timeout=_SILENCE_S) as client:
        response = await client.get(path, params={"after": seen.last, "wait": 1})
    seen.connections += 1
    if response.status_code != 200:
        _refused(seen, response)
        await asyncio.sleep(_AGAIN_S)
        return True
    page = response.json()
    for event in page["events"]:
        seen.take(event)
    return bool(page["has_more"])


def any_of(origins: Sequence[str], chance: random.Random) -> Pick:
    """Another origin each time, at random."""
    return lambda: chance.choice(origins)


def first_of(origins: Sequence[str]) -> Pick:
    """The first one at first, then the others in turn."""
    turn = iter(range(1 << 30))
    return lambda: origins[next(turn) % len(origins)]
