"""A server that answers with exactly the bytes a test wants, below HTTP where it must be."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

Play = Callable[[asyncio.StreamWriter], Awaitable[None]]

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


@asynccontextmanager
async def raw_server(play: Play) -> AsyncIterator[str]:
    """Serve `play` after every request's head and body, one request per connection; yields a base URL."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await receive(reader)
            await play(writer)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client left first
        finally:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"


@dataclass(frozen=True, slots=True)
class Heard:
    """One request as it arrived; header names in lower case, the body parsed."""

    line: str
    headers: dict[str, str]
    body: Any


@asynccontextmanager
async def listener() -> AsyncIterator[tuple[str, list[Heard]]]:
    """A server that refuses every request, politely, and keeps what it heard; yields its root URL and that list."""
    heard: list[Heard] = []

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head, body = await receive(reader)
        line, *fields = head.decode("latin-1").rstrip().split("\r\n")
        headers = dict(field.split(": ", 1) for field in fields)
        heard.append(Heard(line, {name.lower(): value for name, value in headers.items()}, json.loads(body)))
        writer.write(b"HTTP/1.1 400 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(listen, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", heard


async def written(writer: asyncio.StreamWriter, answer: bytes) -> None:
    """Play one whole answer."""
    writer.write(answer)


async def receive(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """One request, head and body."""
    head = await reader.readuntil(b"\r\n\r\n")
    return head, await reader.readexactly(_length(head))


def _length(head: bytes) -> int:
    lines = head.lower().split(b"\r\n")
    return next((int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length:")), 0)


def chunked(piece: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(piece), piece)


def as_stream(pieces: list[bytes]) -> bytes:
    """A whole response whose body is these pieces, each a chunk of its own."""
    body = b"".join(chunked(piece) for piece in pieces if piece)
    return HEAD + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n" + body + b"0\r\n\r\n"
