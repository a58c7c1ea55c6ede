"""This process as an owner of streams: its row, its heartbeat, and the fence that every write of a run takes.

A replica is one incarnation: once its row says `alive = false` it never writes again (G7). The fence is a share
lock on that row inside the writing transaction, so whoever declares a replica dead waits for the write under way
and ends all further ones.
"""

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from time import monotonic
from uuid import UUID, uuid4

import asyncpg

from app import __version__
from app.commits import noting
from app.errors import Unavailable
from app.postgres import ACQUIRE_S, Connection, Pool, prompt_connection, roll_back
from app.wall import Wall

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
# A replica's lock is named by the first half of its id. Others look at it and never try it: that would get in its
# owner's way.
_KEY = "('x' || translate(left(r.id::text, 18), '-', ''))::bit(64)::bigint"
_LOCK = "select pg_try_advisory_lock($1)"
_HELD = """
select classid::bigint << 32 | objid::bigint as key from pg_locks
where locktype = 'advisory' and objsubid = 1 and granted
  and database = (select oid from pg_database where datname = current_database())
"""
_LOOK = f"""
select r.id, h.key is not null as held, clock_timestamp() as now
from replicas r left join ({_HELD}) h on h.key = {_KEY}
where r.alive
"""
_FENCE_SUSPECT = f"""
update replicas r set alive = false
where r.id = $1 and r.alive and {_KEY} not in ({_HELD})
  and not exists (select from replica_beats b where b.replica_id = r.id and b.beat_at > $2)
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


@dataclass(frozen=True, slots=True)
class Seen:
    """A living replica as the database shows it: whether anybody holds its lock, at what time by the database."""

    id: UUID
    held: bool
    at: datetime


class Replica:
    """The current incarnation. After `renew` the process goes on as another replica, owning nothing."""

    def __init__(self, pool: Pool, *, reserve: Pool | None = None, url: str | None = None, lease_s: float = 6) -> None:
        self._pool = pool
        # Heartbeats do not wait for what else the pool is used for.
        self._reserve = reserve or pool
        self._lease_s = lease_s
        self._url = url
        self.id: UUID = uuid4()
        # Why new work is refused: still starting, draining; None while serving.
        self.refusal: Unavailable | None = Unavailable(
            "starting", "The server is starting: it waits for its database.", retry_after=2
        )
        self._beating_since: float | None = None
        self._beat_at = 0.0
        self._retired = False
        # Told of what a transaction has changed, once it is committed.
        self.on_commit: Callable[[Mapping[UUID, int]], None] = lambda changes: None

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
        self._beating_since = self._beat_at = monotonic()

    async def renew(self) -> None:
        """Become a new incarnation, after a fence."""
        self.id = uuid4()
        await self.register()

    async def beat(self) -> None:
        """Raises Fenced where this replica has been declared dead, which it may not have noticed otherwise."""
        if self._retired:
            return
        try:
            async with prompt_connection(self._reserve, _BEAT_S) as connection:
                # Retired in this very moment, it knows of its death.
                if await connection.execute(_BEAT, self.id) == "INSERT 0 0" and not self._retired:
                    raise Fenced(str(self.id))
        except Exception:
            self._beating_since = None
            raise
        now = monotonic()
        if self._beating_since is None or self._was_away(now):
            self._beating_since = now
        self._beat_at = now

    @property
    def beating(self) -> bool:
        """Whether the last heartbeat reached the database."""
        return self._beating_since is not None

    def may_fence(self) -> bool:
        """Only after a full lease of one's own beats: the first one back after an outage must not fence them all.

        A beat that is late by half a lease counts as an outage, too: then those of the others may be as late.
        """
        now = monotonic()
        if self._beating_since is None or self._was_away(now):
            return False
        return now - self._beating_since >= self._lease_s

    def _was_away(self, now: float) -> bool:
        return now - self._beat_at > self._lease_s / 2

    async def retire(self) -> None:
        """The last word of a drained replica: successors may claim what it left at once."""
        self._retired = True
        async with prompt_connection(self._pool) as connection:
            await connection.execute(_RETIRE, self.id)

    async def forget_dead(self) -> None:
        """Keep the tables as small as the number of starts in a week."""
        await self._pool.execute(_FORGET_DEAD)
        await self._pool.execute(_FORGET_BEATS)

    async def fence_silent(self) -> list[UUID]:
        """Declare every other replica dead that has been silent for the lease. By the database's clock alone."""
        fenced = []
        for row in await self._pool.fetch(_SILENT, self.id, self._lease_s):
            if await self._pool.execute(_RETIRE, row["id"]) == "UPDATE 1":
                fenced.append(row["id"])
        return fenced

    async def hold(self, connection: Connection) -> bool:
        """Take this replica's lock for as long as the connection lives: its release tells others of a sudden death."""
        key = int.from_bytes(self.id.bytes[:8], "big", signed=True)
        held: bool = await connection.fetchval(_LOCK, key)
        return held

    async def look(self, connection: Connection) -> list[Seen]:
        """Every living replica, this one too."""
        return [Seen(*row) for row in await connection.fetch(_LOOK)]

    async def fence_suspect(self, replica_id: UUID, since: datetime) -> bool:
        """Declare a replica dead whose lock is free and that has not beaten since; false where it lives after all."""
        return await self._pool.execute(_FENCE_SUSPECT, replica_id, since) == "UPDATE 1"

    @asynccontextmanager
    async def transaction(
        self, owner: UUID | None = None, *, wall: Wall | None = None
    ) -> AsyncGenerator[Connection, None]:
        """A transaction of this replica: the fence is taken last, in one round trip with COMMIT.

        With `owner` it is one of that incarnation only; with `wall` one of the request, behind it.

        Raises Fenced, and nothing was written, where that is no longer alive.
        """
        owner = owner or self.id
        pool, begin = (self._pool, "begin") if wall is None else wall.entrance()
        async with pool.acquire(timeout=ACQUIRE_S) as connection:
            await _begin(connection, begin)
            try:
                with noting() as changes:
                    yield connection
                await connection.execute(_fence_and_commit(owner))
            except asyncpg.InvalidTransactionTerminationError:
                await roll_back(connection)
                raise Fenced(str(owner)) from None
            except BaseException:
                await roll_back(connection)
                raise
        self.on_commit(changes)


async def _begin(connection: Connection, begin: str) -> None:
    try:
        await connection.execute(begin, timeout=ACQUIRE_S)
    except TimeoutError:
        connection.terminate()
        raise


def _fence_and_commit(owner: UUID) -> str:
    # Simple-protocol text runs in one round trip but takes no parameters; a UUID's text is safe in a literal.
    # No living owner: the function raises, and COMMIT is never reached.
    return f"select parley_fence('{owner}'); commit"
