"""This server as a replica among others: it comes when the database is usable, stays alive, and leaves when asked."""

import asyncio
from time import monotonic

import asyncpg
import structlog

from app.errors import Misconfigured, Unavailable
from app.gateway.parts import Parts
from app.postgres import AWAY, wait_for_database, warm
from app.schema import require_current
from app.streams.replicas import Fenced

log = structlog.get_logger(__name__)

# How long a stopping server waits for accepts that were under way, in seconds; longer than one waits for locks.
_ACCEPTS_S = 5
# How long telling the others that this replica leaves may take, in seconds.
_GOODBYE_S = 1


class Life:
    """What the server's owner and the app tell each other: it serves; it shall leave; it has drained."""

    def __init__(self) -> None:
        self.serving = asyncio.Event()
        self.leave = asyncio.Event()
        self.drained = asyncio.Event()


class Presence:
    """Of one replica, from the wait for its database to its goodbye."""

    def __init__(self, parts: Parts, life: Life) -> None:
        self._parts = parts
        self._life = life
        self._replica = parts.streaming.replica
        self._log = parts.streaming.log

    async def come_up(self) -> None:
        """Wait for a usable database, however long that takes, and register with it."""
        while not await self._usable():
            await asyncio.sleep(1)
        self._replica.refusal = None
        self._life.serving.set()
        log.info("serving", replica=str(self._replica.id))

    async def _usable(self) -> bool:
        try:
            await self._register()
        except (Misconfigured, *AWAY, asyncpg.PostgresError) as error:
            detail = error.detail if isinstance(error, Misconfigured) else str(error)
            log.warning("database_waiting", why=detail)
            self._replica.refusal = Unavailable("starting", f"The server is starting: {detail}", retry_after=2)
            return False
        return True

    async def _register(self) -> None:
        resources = self._parts.resources
        await wait_for_database(resources.dsn, float("inf"), lambda reason: log.warning("database_waiting", why=reason))
        async with resources.pool.acquire() as connection:
            await require_current(connection)
            await resources.wall.look_for_role(connection)
        await self._parts.door.signing.run_once()
        await self._parts.streaming.partitions.run_once()
        await self._replica.register()
        await warm(resources.pool, self._parts.settings.pool_size // 2)

    async def beat(self) -> None:
        """Say that this replica lives. Where it was declared dead meanwhile, it begins another life."""
        if self._log.fenced:
            await self._renew()
        try:
            await self._replica.beat()
        except Fenced as fenced:
            # Nothing was written that would have told.
            self._log.fence(fenced)
            await self._renew()
        except TimeoutError:
            await self.distrust()
            raise

    async def _renew(self) -> None:
        await self._replica.renew()
        self._log.fenced = False
        log.warning("replica_renewed", replica=str(self._replica.id))

    async def distrust(self) -> None:
        """One connection is dead without a word: none of the others is used again, so that nobody waits in vain."""
        await self._parts.resources.distrust()
        self._parts.streaming.appender.disconnect()

    async def leave_when_asked(self) -> None:
        """Refuse new work, let answers and uploads end, leave the others to whoever lives, send the readers away at a
        frame boundary.
        """
        await self._life.leave.wait()
        self._replica.refusal = Unavailable("draining", "The server is stopping; ask another one.", retry_after=1)
        try:
            await self._let_end()
            async with asyncio.timeout(_GOODBYE_S):
                await self._say_goodbye()
        except (*AWAY, asyncpg.PostgresError) as error:
            log.warning("goodbye_failed", error=type(error).__name__)
        finally:
            self._parts.streaming.hub.close()
            self._parts.nudges.close()
            self._parts.news.close()
            self._life.drained.set()

    async def _let_end(self) -> None:
        parts, began = self._parts, monotonic()
        await parts.answering.intake.close(_ACCEPTS_S)
        left = max(0, parts.settings.drain_s - (monotonic() - began))
        await asyncio.gather(parts.runs.runner.drain(left), parts.allowances.uploads.settle(left))

    async def _say_goodbye(self) -> None:
        streaming = self._parts.streaming
        await streaming.streams.let_go()
        await self._replica.retire()
        await streaming.bus.tell_gone()
        await self._parts.watch.journal.run_once()
        await self._parts.figures.run_once()
