"""The two connections of the bus: one that hears notifications and reads what they tell of, one that sends them."""

import asyncio
from collections.abc import Callable, Sequence

import asyncpg

from app.postgres import Connection, open_connection
from app.streams.signals import Message

# Nothing is lost that the table does not have, so a notification waits for no disk. (It does wait for other
# notifying transactions: PostgreSQL keeps their commits in one order.)
_IN_HASTE = "set synchronous_commit = off"
_NOTIFY = "select pg_notify(m.channel, m.payload) from unnest($1::text[], $2::text[]) as m(channel, payload)"
# A statement is planned once, perhaps while a day has hardly begun; scanning that day's partition then looks cheap, and
# stays the plan until statistics are renewed.
_BY_INDEX = "set enable_seqscan = off"
# Connecting or sending takes no longer than this, in seconds.
_PATIENCE_S = 3


class Speaker:
    """Sends notifications, one statement at a time."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._turn = asyncio.Lock()
        self._connection: Connection | None = None

    async def say(self, messages: Sequence[Message]) -> None:
        """All of them in one statement. Where it raises, perhaps none was sent."""
        async with self._turn, asyncio.timeout(_PATIENCE_S):
            try:
                if self._connection is None or self._connection.is_closed():
                    self._connection = await open_connection(self._dsn, timeout_s=_PATIENCE_S)
                    await self._connection.execute(_IN_HASTE)
                await self._connection.execute(_NOTIFY, *map(list, zip(*messages, strict=True)))
            except BaseException:
                self.disconnect()
                raise

    def disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.terminate()


class Listener:
    """Hands every payload of its channels to `heard`; calls `lost` when the server or the network ends it.

    It also reads: whoever has just heard something has a connection that works, and waits for nobody's.
    """

    def __init__(
        self, dsn: str, channels: Sequence[str], *, heard: Callable[[str], None], lost: Callable[[], None]
    ) -> None:
        self._dsn = dsn
        self._channels = channels
        self._heard = heard
        self._lost = lost
        self._connection: Connection | None = None

    @property
    def connected(self) -> bool:
        return self._connection is not None

    async def connect(self) -> None:
        async with asyncio.timeout(_PATIENCE_S):
            connection = await open_connection(self._dsn, timeout_s=_PATIENCE_S)
            try:
                await connection.execute(_BY_INDEX)
                for channel in self._channels:
                    await connection.add_listener(channel, self._on_notification)
            except BaseException:
                connection.terminate()
                raise
        self._connection = connection
        connection.add_termination_listener(self._on_end)

    async def fetch(self, statement: str, *values: object) -> list[asyncpg.Record]:
        """Not several at once. Raises what a broken connection raises; it is given up then."""
        connection = self._connection
        if connection is None:
            raise ConnectionResetError("the listener is not connected")
        try:
            async with asyncio.timeout(_PATIENCE_S):
                return await connection.fetch(statement, *values)
        except BaseException:
            connection.terminate()
            raise

    def _on_notification(self, connection: object, pid: int, channel: str, payload: object) -> None:
        self._heard(str(payload))

    def _on_end(self, connection: object) -> None:
        if connection is self._connection:
            self._connection = None
            self._lost()

    def disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.terminate()
