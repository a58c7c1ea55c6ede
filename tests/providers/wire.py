"""A server that answers with exactly the bytes a test wants, below HTTP where it must be."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

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


async def receive(reader: asyncio.StreamReader) -> None:
    """One request, head and body."""
    head = await reader.readuntil(b"\r\n\r\n")
    await reader.readexactly(_length(head))


def _length(head: bytes) -> int:
    lines = head.lower().split(b"\r\n")
    return next((int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length:")), 0)


def chunked(piece: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(piece), piece)


def as_stream(pieces: list[bytes]) -> bytes:
    """A whole response whose body is these pieces, each a chunk of its own."""
    body = b"".join(chunked(piece) for piece in pieces if piece)
    return HEAD + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n" + body + b"0\r\n\r\n"
