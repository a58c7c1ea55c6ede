"""This process as an owner of streams: its row, its heartbeat, and the fence that every write of a run takes.

A replica is one incarnation: once its row says `alive = false` it never writes again (G7). The fence is a share
lock on that row inside the writing transaction, so whoever declares a replica dead waits for the write under way
and ends all further ones.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from time import monotonic
from uuid import UUID, uuid4

import asyncpg

from app import __version__
from app.errors import Unavailable
from app.postgres import ACQUIRE_S, AWAY, Connection, Pool, prompt_connection

# Beats live in a table of their own: an UPDATE of the fenced row would starve behind the appends' share locks.
_REGISTER = "insert into replicas (id, url, version) values ($1, $2, $3)"
_BEAT = """
insert into replica_beats (replica_id, beat_at)
select $1, clock_timestamp() where exists (select from replicas where id = $1 and alive)
on conflict (replica_id) do update set beat_at = excluded.beat_at
"""
_RETIRE = "update replicas set alive = false where id = $1 and alive"
_SILENT = """
select r.id from replicas r left join replica_beats b on b.replica_id = r.id
where r.alive and r.id <> $1 and coalesce(b.beat_at, r.started_at) < clock_timestamp() - make_interval(secs => $2)
limit 100
"""

# Rows of the dead, once nothing unfinished names them. The log unit's tables may be asked about each other by key.
_FORGET_DEAD = """
delete from replicas r where not r.alive and r.started_at < now() - interval '7 days'
    and not exists (select from streaming_sessions s where s.replica_id = r.id and s.status in ('queued', 'active'))
"""
_FORGET_BEATS = "delete from replica_beats b where not exists (select from replicas r where r.id = b.replica_id)"


# A beat that takes longer has failed, in seconds: who waits must not be left in the dark for longer than that.
_BEAT_S = 2


class Fenced(Exception):
    """This replica was declared dead: it must stop everything it was doing and write nothing more."""


class Replica:
    """The current incarnation. After `renew` the process goes on as another replica, owning nothing."""

    def __init__(self, pool: Pool, *, url: str | None = None) -> None:
        self._pool = pool
        self._url = url
        self.id: UUID = uuid4()
        # Why new work is refused: still starting, draining; None while serving.
        self.refusal: Unavailable | None = Unavailable(
            "starting", "The server is starting: it waits for its database.", retry_after=2
        )
        self._beating_since: float | None = None

    def admit(self) -> None:
        """Raises Unavailable where no new work is taken. Nobody waits for a database that is known to be away."""
        if self.refusal is not None:
            raise self.refusal
        if not self.beating:
            raise Unavailable("database_unavailable", "The database is away.", retry_after=2)

    async def register(self) -> None:
        async with self._pool.acquire(timeout=ACQUIRE_S) as connection, connection.transaction():
            await connection.execute(_REGISTER, self.id, self._url, __version__)
            await connection.execute(_BEAT, self.id)
        self._beating_since = monotonic()

    async def renew(self) -> None:
        """Become a new incarnation, after a fence."""
        self.id = uuid4()
        await self.register()

    async def beat(self) -> None:
        """Raises Fenced where this replica has been declared dead, which it may not have noticed otherwise."""
        try:
            async with prompt_connection(self._pool, _BEAT_S) as connection:
                if await connection.execute(_BEAT, self.id) == "INSERT 0 0":
                    raise Fenced(str(self.id))
        except Exception as error:
            self._beating_since = None
            if isinstance(error, TimeoutError):
                # Whatever the others of the pool wait for will not come, either.
                await self._pool.expire_connections()
            raise
        if self._beating_since is None:
            self._beating_since = monotonic()

    @property
    def beating(self) -> bool:
        """Whether the last heartbeat reached the database."""
        return self._beating_since is not None

    def may_fence(self, lease_s: float) -> bool:
        """Only after a full lease of one's own beats: the first one back after an outage must not fence them all."""
        return self._beating_since is not None and monotonic() - self._beating_since >= lease_s

    async def retire(self) -> None:
        """The last word of a drained replica: successors may claim what it left at once."""
        await self._pool.execute(_RETIRE, self.id)

    async def forget_dead(self) -> None:
        """Keep the tables as small as the number of starts in a week."""
        await self._pool.execute(_FORGET_DEAD)
        await self._pool.execute(_FORGET_BEATS)

    async def fence_silent(self, lease_s: float) -> list[UUID]:
        """Declare every other replica dead that has been silent for the lease. By the database's clock alone."""
        fenced = []
        for row in await self._pool.fetch(_SILENT, self.id, lease_s):
            if await self._pool.execute(_RETIRE, row["id"]) == "UPDATE 1":
                fenced.append(row["id"])
        return fenced

    @asynccontextmanager
    async def transaction(self) -> AsyncGenerator[Connection, None]:
        """A transaction of this replica: the fence is taken last, in one round trip with COMMIT.

        Raises Fenced, and nothing was written, where this replica is no longer alive.
        """
        owner = self.id
        async with self._pool.acquire(timeout=ACQUIRE_S) as connection:
            await _begin(connection)
            try:
                yield connection
                await connection.execute(_fence_and_commit(owner))
            except asyncpg.DivisionByZeroError:
                await _roll_back(connection)
                raise Fenced(str(owner)) from None
            except BaseException:
                await _roll_back(connection)
                raise


async def _begin(connection: Connection) -> None:
    try:
        await connection.execute("begin", timeout=ACQUIRE_S)
    except TimeoutError:
        connection.terminate()
        raise


async def _roll_back(connection: Connection) -> None:
    try:
        async with asyncio.timeout(2):
            await connection.execute("rollback")
    except (*AWAY, asyncio.CancelledError):
        connection.terminate()


def _fence_and_commit(owner: UUID) -> str:
    # Simple-protocol text runs in one round trip but takes no parameters; a UUID's text is safe in a literal.
    # No living owner: the count is 0, the division fails, and COMMIT is never reached.
    return f"select 1 / count(*) from (select from replicas where id = '{owner}' and alive for share) o; commit"
