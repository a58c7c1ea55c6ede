"""A TCP or Unix-socket path between two parties that a test can cut, in either direction, at any moment."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

Dial = Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


class Wire:
    """Forwards every connection; `answers` cleared swallows what comes back, `cut` breaks all connections."""

    def __init__(self, dial: Dial) -> None:
        self._dial = dial
        self._pairs: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self.answers = asyncio.Event()
        self.answers.set()
        self.forwarded = 0
        self.returned = 0
        self._is_over = False

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await self._dial()
        pair = (writer, far_writer)
        self._pairs.add(pair)
        if self._is_over:
            self.cut()
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._copy(reader, far_writer, back=False))
                tasks.create_task(self._copy(far_reader, writer, back=True))
        finally:
            self._pairs.discard(pair)
            for side in pair:
                side.close()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, back: bool) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                if back:
                    self.returned += len(data)
                    if not self.answers.is_set():
                        continue
                else:
                    self.forwarded += len(data)
                writer.write(data)
                await writer.drain()
            writer.close()

    def end(self) -> None:
        """Cut, and also those that are just coming."""
        self._is_over = True
        self.cut()

    def cut(self) -> None:
        for pair in self._pairs:
            for side in pair:
                transport = side.transport
                assert isinstance(transport, asyncio.WriteTransport)
                transport.abort()


@asynccontextmanager
async def wire_to_tcp(host: str, port: int) -> AsyncGenerator[tuple[Wire, int], None]:
    """A wire to a TCP server; yields it and the local port in front of it."""
    wire = Wire(lambda: asyncio.open_connection(host, port))
    server = await asyncio.start_server(wire.accept, "127.0.0.1", 0)
    try:
        yield wire, server.sockets[0].getsockname()[1]
    finally:
        server.close()
        wire.cut()


@asynccontextmanager
async def wire_to_postgres(dsn: str) -> AsyncGenerator[tuple[Wire, str], None]:
    """A wire to the PostgreSQL of a DSN whose `host` is a socket folder; yields it and the DSN through it."""
    from urllib.parse import parse_qs, urlsplit

    url = urlsplit(dsn)
    query = parse_qs(url.query)
    path = f"{query['host'][0]}/.s.PGSQL.{query['port'][0]}"
    wire = Wire(lambda: asyncio.open_unix_connection(path))
    server = await asyncio.start_server(wire.accept, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        yield wire, f"postgresql://{url.username}@127.0.0.1:{port}{url.path}?sslmode=disable"
    finally:
        server.close()
        wire.cut()
