"""The parts of the event log wired as main wires them, for tests that drive them directly."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from uuid import UUID

from app.postgres import Connection, Pool, open_pool
from app.streams.appending import Appender
from app.streams.hub import Hub
from app.streams.log import Limits, Log, Writer
from app.streams.partitions import Partitions
from app.streams.replicas import Replica
from app.streams.stream import NEW_ID, Stream, Streams, random_part
from app.streams.tail import Tail
from app.telemetry import Metrics
from app.wall import Wall


@dataclass
class Engine:
    pool: Pool
    replica: Replica
    hub: Hub
    appender: Appender
    log: Log
    streams: Streams
    tail: Tail
    metrics: Metrics

    async def begin(self) -> Stream:
        """An active stream with its first event."""
        async with self.replica.transaction() as connection:
            new_id = await connection.fetchval(f"select {NEW_ID.format(random_part='$1')}", random_part())
            stream = Stream(new_id, "u", "s", "c", 1, "main")
            await self.streams.begin(connection, stream, {})
        return stream

    async def writer(self) -> Writer:
        return self.log.open((await self.begin()).id, last_id=1)

    async def stored(self, stream_id: UUID) -> list[int]:
        rows = await self.pool.fetch("select id from streaming_events where stream_id = $1 order by id", stream_id)
        return [row["id"] for row in rows]

    async def end(self, writer: Writer) -> None:
        await self.streams.conclude(writer, "stream_end", {"status": "completed"}, work=_nothing, status="completed")

    async def read(self, stream_id: UUID, cursor: int = 0) -> list[int]:
        """The ids a reader gets from the cursor to the end."""
        return [
            event_id
            async for batch in self.tail.follow(stream_id, cursor, 60)
            for event_id in range(batch.first, batch.last + 1)
        ]


async def _nothing(_: Connection) -> None:
    return None


@asynccontextmanager
async def engine(
    database: str,
    *,
    limits: Limits | None = None,
    lane: bool = True,
    log_dsn: str | None = None,
    appender_type: type[Appender] = Appender,
) -> AsyncGenerator[Engine, None]:
    """A replica with its log; with `lane`, flushing by itself. `log_dsn` is another way to the same database."""
    pool = await open_pool(database, 10)
    metrics = Metrics()
    replica = Replica(pool)
    hub = Hub(max_events=256, max_bytes=1 << 20)
    appender = appender_type(log_dsn or database, replica)
    log = Log(appender, replica, hub, limits=limits or Limits(), metrics=metrics)
    await Partitions(pool, days_ahead=1).run_once()
    await replica.register()
    task = asyncio.ensure_future(log.run()) if lane else None
    try:
        yield Engine(pool, replica, hub, appender, log, Streams(pool, replica), Tail(Wall(pool), hub, log), metrics)
    finally:
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        appender.disconnect()
        await pool.close()
