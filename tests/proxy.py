"""A TCP proxy in front of a server that a test can stall, cut, close and open again at any moment."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from urllib.parse import parse_qs, urlencode, urlsplit, urlunsplit

Dial = Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


class Proxy:
    """Forwards every connection, until told otherwise. All methods act at once, on old and on new connections.

    `stall`: a black hole. Nothing arrives any more and nobody is told; connecting works. `close`: connections break
    and new ones are refused. `cut`: connections break, new ones work. `open`: as at first; what a stall has held back
    is delivered late, as by TCP. `forsake`: what is open now hears nothing any more; new connections work.
    """

    def __init__(self, dial: Dial) -> None:
        self._dial = dial
        self._writers: set[asyncio.StreamWriter] = set()
        self._there, self._back = asyncio.Event(), asyncio.Event()
        self._forsaken: list[asyncio.Event] = []
        self._closed = False
        self.port = 0
        self.open()

    @property
    def connections(self) -> int:
        """How many are open now."""
        return len(self._writers) // 2

    def open(self) -> None:
        self._closed = False
        for passing in (self._there, self._back, *self._forsaken):
            passing.set()

    def stall(self, *, answers_only: bool = False) -> None:
        """With `answers_only` the server still hears everything: the answer of a COMMIT is lost, say."""
        if not answers_only:
            self._there.clear()
        self._back.clear()

    def forsake(self) -> None:
        self.stall()
        self._forsaken += [self._there, self._back]
        self._there, self._back = asyncio.Event(), asyncio.Event()
        self._there.set()
        self._back.set()

    def cut(self) -> None:
        for writer in list(self._writers):
            writer.transport.abort()

    def close(self) -> None:
        self._closed = True
        self.cut()

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._closed:
            writer.transport.abort()
            return
        try:
            far_reader, far_writer = await self._dial()
        except OSError:
            writer.transport.abort()
            return
        pair = {writer, far_writer}
        self._writers |= pair
        copies = [
            asyncio.ensure_future(_copy(reader, far_writer, self._there)),
            asyncio.ensure_future(_copy(far_reader, writer, self._back)),
        ]
        try:
            # One side's end is the other's. While stalled nobody hears of it.
            await asyncio.wait(copies, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for copy in copies:
                copy.cancel()
            self._writers -= pair
            for side in pair:
                side.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, passing: asyncio.Event) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            await passing.wait()
            writer.write(data)
            await writer.drain()
        await passing.wait()


@asynccontextmanager
async def proxy_to(dial: Dial, port: int = 0) -> AsyncGenerator[Proxy, None]:
    proxy = Proxy(dial)
    async with await asyncio.start_server(proxy.accept, "127.0.0.1", port) as server:
        proxy.port = server.sockets[0].getsockname()[1]
        try:
            yield proxy
        finally:
            # Also what still waits in a stall; leaving the block then waits for nobody.
            proxy.open()
            proxy.close()


@asynccontextmanager
async def proxy_to_postgres(dsn: str) -> AsyncGenerator[tuple[Proxy, str], None]:
    """A proxy to the server of a DSN, on a socket folder or a host; yields it and the DSN through it."""
    url = urlsplit(dsn)
    query = {name: values[0] for name, values in parse_qs(url.query).items()}
    if folder := query.pop("host", None):
        path = f"{folder}/.s.PGSQL.{query.pop('port', '5432')}"
        dial: Dial = lambda: asyncio.open_unix_connection(path)  # noqa: E731
    else:
        dial = lambda: asyncio.open_connection(url.hostname, url.port or 5432)  # noqa: E731
    async with proxy_to(dial) as proxy:
        user = url.netloc.rpartition("@")[0]
        netloc = f"{user}@127.0.0.1:{proxy.port}" if user else f"127.0.0.1:{proxy.port}"
        parameters = urlencode({"sslmode": "disable", **query})
        yield proxy, urlunsplit(url._replace(netloc=netloc, query=parameters))
