"""Replicas of one database with a bus between them, in one process; nothing here looks at the table by itself."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from app.streams.bus import NotifyBus, Times
from app.streams.topics import Topics
from tests.streams.engine import Engine, engine

# Long enough for nothing to happen by itself, short enough to be waited for where a test wants it.
QUIET = Times(gather=0.001, repeat=600, forget=1800, probe=600, echo=5, again=0.01)


class Failing(set[str]):
    """What fails now, and what ever failed."""

    def __init__(self) -> None:
        self.ever: list[str] = []

    def add(self, name: str) -> None:
        self.ever.append(name)
        super().add(name)


@dataclass
class Peer:
    parts: Engine
    bus: NotifyBus
    failing: Failing
    topics: Topics


@asynccontextmanager
async def peer(
    database: str,
    *,
    listen: str | None = None,
    times: Times = QUIET,
    running: bool = True,
    bus_type: type[NotifyBus] = NotifyBus,
) -> AsyncGenerator[Peer, None]:
    """A replica whose bus listens; `listen` is another way to the same database."""
    async with engine(database) as parts:
        failing, topics = Failing(), Topics(pace_s=0)
        bus = bus_type(
            listen or database,
            hub=parts.hub,
            event_log=parts.log,
            metrics=parts.metrics,
            failing=failing,
            topics=topics,
            times=times,
        )
        task = asyncio.ensure_future(bus.run()) if running else None
        if running:
            await until(lambda: bool(bus.state()["listening"]))
        try:
            yield Peer(parts, bus, failing, topics)
            assert not failing
        finally:
            if task is not None:
                task.cancel()
                await asyncio.wait([task])


@asynccontextmanager
async def peers(database: str, count: int, *, times: Times = QUIET) -> AsyncGenerator[list[Peer], None]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(peer(database, times=times)) for _ in range(count)]


async def until(true: Callable[[], bool], *, within_s: float = 10) -> None:
    async with asyncio.timeout(within_s):
        while not true():
            await asyncio.sleep(0.002)
