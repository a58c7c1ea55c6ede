"""A sudden death noticed at once: every replica holds a lock in a session of its own, which dies with the process.

A free lock is a suspicion and no more (docs/decisions/0006). Bounded by the number of living replicas.
"""

import asyncio
import contextlib
from collections.abc import Callable
from datetime import datetime, timedelta
from uuid import UUID

import structlog

from app.postgres import Connection, open_connection
from app.streams.replicas import Fenced, Replica
from app.ticker import every

log = structlog.get_logger(__name__)

# How often locks are looked at, and how long one must stay free, in seconds.
_LOOK_S = 0.18
_FREE = timedelta(seconds=0.7)
_ANSWER_S = 2


class Lifeline:
    """This replica's own lock, and a look at those of the others. `on_gone` hears that one of them has gone."""

    def __init__(self, dsn: str, replica: Replica, *, on_gone: Callable[[], None]) -> None:
        self._dsn = dsn
        self._replica = replica
        self._on_gone = on_gone
        self._connection: Connection | None = None
        self._held: UUID | None = None
        self._known: set[UUID] = set()
        # Whose lock was held while our session lived. A lock that was free before may have gone with everybody's, when
        # the database was restarted: that says nothing.
        self._trusted: set[UUID] = set()
        self._suspects: dict[UUID, datetime] = {}

    async def run(self, failing: set[str]) -> None:
        """Hold and look until cancelled."""
        try:
            await every(_LOOK_S, self.run_once, name="lifeline", failing=failing, again_s=_LOOK_S)
        finally:
            self._disconnect()

    async def run_once(self) -> None:
        """Take the lock again where it was lost, saying at once that we live; then look at the others."""
        try:
            async with asyncio.timeout(_ANSWER_S):
                connection = await self._hold()
                await self._judge(connection)
        except Exception:
            self._disconnect()
            await self._beat()
            raise

    async def _hold(self) -> Connection:
        if self._connection is None or self._connection.is_closed():
            self._disconnect()
            self._connection = await open_connection(self._dsn, timeout_s=_ANSWER_S)
        if self._held != self._replica.id:
            if await self._replica.hold(self._connection):
                self._held = self._replica.id
            await self._beat()
        return self._connection

    async def _beat(self) -> None:
        with contextlib.suppress(Fenced):  # the heartbeat's own loop sees to that
            async with asyncio.timeout(_ANSWER_S):
                await self._replica.beat()

    async def _judge(self, connection: Connection) -> None:
        living = {seen.id: seen for seen in await self._replica.look(connection)}
        if self._known - living.keys():
            self._on_gone()
        self._known = set(living)
        self._trusted &= living.keys()
        if (own := living.pop(self._replica.id, None)) is not None and not own.held:
            self._held = None  # somebody between us and the database has changed our session
        for seen in living.values():
            if seen.held:
                self._trusted.add(seen.id)
        free = {seen.id: seen for seen in living.values() if not seen.held and seen.id in self._trusted}
        self._suspects = {name: self._suspects.get(name, seen.at) for name, seen in free.items()}
        for seen in free.values():
            if seen.at - self._suspects[seen.id] >= _FREE:
                await self._fence(seen.id)

    async def _fence(self, suspect: UUID) -> None:
        if await self._replica.fence_suspect(suspect, self._suspects[suspect]):
            log.warning("replica_declared_dead", replica=str(suspect), because="its lock is free")
            self._on_gone()
        else:
            # It has beaten since: whatever it lost, it is alive. The suspicion begins anew.
            del self._suspects[suspect]

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.terminate()
        self._connection, self._held = None, None
        self._trusted.clear()
        self._suspects.clear()
