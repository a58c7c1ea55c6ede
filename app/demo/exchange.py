"""One request being answered: paced writes, and the ways a connection can end that HTTP libraries hide."""

import asyncio
import hashlib
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.demo.dialect import Dialect, stamped
from app.demo.wishes import Wishes

_EXTENSION = "demo.connection"
_SSE = ((b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"))
# Pauses up to this long are not worth a timer that notices the client leaving.
_SHORT_S = 0.25
_SECRET = ("authorization", "x-api-key")


class Connection:
    """The TCP connection below a request; `lost` is set when the client, or we, closed it."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        self.lost = asyncio.Event()
        self.lost_at: float | None = None


class Protocol(HttpToolsProtocol):
    """uvicorn's own protocol, which also hands the connection to the application as an ASGI extension."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.connection = Connection(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.connection.lost_at = time.time()
        self.connection.lost.set()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {_EXTENSION: self.connection}  # type: ignore[dict-item]


@dataclass(slots=True)
class Record:
    """What a test may want to know about a request afterwards. `closed_at`: when the client left before the end."""

    key: str
    client: str
    headers: Mapping[str, str]
    body: Any
    received_at: float = field(default_factory=time.time)
    frames: int = 0
    closed_at: float | None = None
    ended_at: float | None = None
    over: asyncio.Event = field(default_factory=asyncio.Event)

    def shown(self) -> dict[str, Any]:
        names = ("key", "client", "headers", "body", "received_at", "frames", "closed_at", "ended_at")
        return {name: getattr(self, name) for name in names}


def shown_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Headers with the credentials hashed: two requests can be compared, no key can be read."""
    return {name: _hashed(value) if name in _SECRET else value for name, value in headers.items()}


def _credentials(headers: Mapping[str, str]) -> str:
    return next((headers[name] for name in _SECRET if name in headers), "")


def _hashed(value: str) -> str:
    return f"sha256:{hashlib.sha256(value.encode()).hexdigest()[:16]}"


class Exchange:
    """The answer's side of one request: start, write, pace, and end in one of several ways."""

    def __init__(self, wishes: Wishes, record: Record, *, dialect: Dialect, scope: Scope, send: Send) -> None:
        self.wishes = wishes
        self.record = record
        self.dialect = dialect
        self.credentials = _credentials(Headers(scope=scope))
        self._connection: Connection = scope["extensions"][_EXTENSION]
        self._send = send

    async def start(self, status: int = 200, headers: Sequence[tuple[bytes, bytes]] = _SSE) -> None:
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def write(self, data: bytes) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self, data: bytes = b"") -> None:
        await self._send({"type": "http.response.body", "body": data})

    async def pace(self, frames: Sequence[bytes]) -> None:
        """Write the frames, one per `delay_ms`; without a delay in batches, as fast as the reader takes them."""
        wishes, loop = self.wishes, asyncio.get_running_loop()
        size = max(wishes.batch, 1) if wishes.delay_ms == 0 and "bytes" not in wishes.fault else 1
        due = loop.time()
        for start in range(0, len(frames), size):
            if wishes.delay_ms or wishes.first_ms:
                wait_ms = wishes.first_ms if start == 0 and wishes.first_ms is not None else wishes.delay_ms
                due += wait_ms / 1000
                await self.pause(due - loop.time())
            if self._connection.lost.is_set():
                return
            batch = frames[start : start + size]
            data = batch[0] if size == 1 else b"".join(batch)
            await self.write(stamped(data) if wishes.clock else data)
            self.record.frames += len(batch)

    async def pause(self, seconds: float) -> None:
        """Sleep; a long pause ends early when the client has gone."""
        if seconds <= _SHORT_S:
            await asyncio.sleep(max(seconds, 0))
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._connection.lost.wait()

    async def hang(self) -> None:
        """Say nothing more until the client leaves."""
        await self._connection.lost.wait()

    async def cut(self) -> None:
        """Close the connection politely (FIN) with the body unfinished."""
        self._connection.transport.close()
        await self._leave()

    async def reset(self) -> None:
        """Close the connection with a TCP reset: lingering for zero seconds makes the kernel send RST."""
        sock = self._connection.transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._connection.transport.abort()
        await self._leave()

    async def _leave(self) -> None:
        self.record.ended_at = time.time()
        await self._connection.lost.wait()

    def close_record(self) -> None:
        if self.record.ended_at is None and self._connection.lost.is_set():
            self.record.closed_at = self._connection.lost_at
        self.record.ended_at = self.record.ended_at or time.time()
        self.record.over.set()
