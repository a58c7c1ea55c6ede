"""The TCP ways that faults happen on: between a replica and its database, and between readers and the replicas."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Dial = Callable[[], Awaitable[Streams]]

_LISTEN = b"LISTEN "


class _Line:
    """One connection through a way."""

    def __init__(self, near: Streams, far: Streams) -> None:
        self.near, self.far = near, far
        self.listens = self.mute = False

    async def pass_on(self) -> None:
        copies = [asyncio.ensure_future(self._there()), asyncio.ensure_future(self._back())]
        try:
            await asyncio.wait(copies, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for copy in copies:
                copy.cancel()
            self.cut()

    async def _there(self) -> None:
        with contextlib.suppress(OSError):
            while data := await self.near[0].read(65536):
                self.listens = self.listens or _LISTEN in data
                self.far[1].write(data)
                await self.far[1].drain()

    async def _back(self) -> None:
        with contextlib.suppress(OSError):
            while data := await self.far[0].read(65536):
                if not self.mute:
                    self.near[1].write(data)
                    await self.near[1].drain()

    def cut(self) -> None:
        for _, writer in (self.near, self.far):
            writer.transport.abort()


class Way:
    """Forwards connections to the first of its targets that answers, beginning with another one each time.

    Open connections are bounded by those who use it: a replica's pool, a trial's readers.
    """

    def __init__(self, dials: Sequence[Dial]) -> None:
        self._dials = list(dials)
        self._turn = 0
        self._lines: dict[_Line, int] = {}
        # Targets that get nothing: a load balancer's health check has found them silent.
        self.shunned: set[int] = set()
        self.closed = False
        self.port = 0

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        found = None if self.closed else await self._reach()
        if found is None:
            writer.transport.abort()
            return
        target, far = found
        line = _Line((reader, writer), far)
        self._lines[line] = target
        try:
            await line.pass_on()
        finally:
            del self._lines[line]

    async def _reach(self) -> tuple[int, Streams] | None:
        self._turn += 1
        for number in range(len(self._dials)):
            target = (self._turn + number) % len(self._dials)
            if target not in self.shunned:
                with contextlib.suppress(OSError):
                    return target, await self._dials[target]()
        return None

    def cut(self, target: int | None = None) -> None:
        """Break all connections, or those to one target."""
        for line, its in list(self._lines.items()):
            if target in (None, its):
                line.cut()

    def shun(self, target: int) -> None:
        self.shunned.add(target)
        self.cut(target)

    def close(self) -> None:
        self.closed = True
        self.cut()

    def open(self) -> None:
        self.closed = False

    def mute_listeners(self) -> int:
        """What PostgreSQL says on connections that LISTEN gets lost from now on; returns how many there are."""
        listeners = [line for line in self._lines if line.listens]
        for line in listeners:
            line.mute = True
        return len(listeners)


@asynccontextmanager
async def way_to(*dials: Dial) -> AsyncGenerator[Way, None]:
    way = Way(dials)
    async with await asyncio.start_server(way.accept, "127.0.0.1", 0) as server:
        way.port = server.sockets[0].getsockname()[1]
        try:
            yield way
        finally:
            way.close()
