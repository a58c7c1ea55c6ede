"""A strict reader of our SSE frames: anything wire.md does not allow fails the test that sees it."""

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import httpx2
import orjson


@dataclass(frozen=True, slots=True)
class Frame:
    id: str
    event: str
    data: dict[str, Any]
    retry: int | None = None

    @property
    def stream(self) -> str:
        return self.id.partition(":")[0]

    @property
    def number(self) -> int:
        """The event's own id, which comes first where other streams' follow."""
        return int(self.id.partition(",")[0].rpartition(":")[2])


async def frames(
    response: httpx2.Response, on_heartbeat: Callable[[], None] = lambda: None, *, several: bool = False
) -> AsyncGenerator[Frame, None]:
    """Every frame of a response, of one stream or of `several`.

    Comment lines may come between frames only; a blank line must end a frame.
    """
    fields: dict[str, str] = {}
    async for line in _lines(response):
        if line.startswith(":"):
            assert line == ": hb"
            assert not fields or fields.keys() == {"retry"}, "a comment inside a frame"
            on_heartbeat()
        elif line:
            name, _, value = line.partition(": ")
            assert name in ("id", "event", "data", "retry"), line
            assert name not in fields, line
            fields[name] = value
        else:
            assert fields.keys() >= {"id", "event", "data"}, f"a blank line after {fields}"
            frame = Frame(
                fields["id"],
                fields["event"],
                orjson.loads(fields["data"]),
                int(fields["retry"]) if "retry" in fields else None,
            )
            assert several or "," not in frame.id
            assert frame.data["id"] == frame.number
            assert frame.data["event"] == frame.event
            fields = {}
            yield frame
    assert fields.keys() <= {"retry"}, f"cut inside a frame: {fields}"


async def _lines(response: httpx2.Response) -> AsyncIterator[str]:
    rest = b""
    async for data in response.aiter_raw():
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            assert b"\r" not in line
            yield line.decode()
    assert not rest, "cut inside a line"


async def read_stream(client: httpx2.AsyncClient, url: str, last_event_id: str | None = None) -> list[Frame]:
    """Everything from the cursor to the end of the stream."""
    headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": last_event_id} if last_event_id else {})
    async with client.stream("GET", url, headers=headers) as response:
        assert response.status_code == 200
        return [frame async for frame in frames(response)]
