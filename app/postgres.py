"""PostgreSQL for everybody else: the pool, patient connecting, and what to try again."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

import asyncpg
from asyncpg.pool import PoolConnectionProxy

from app.errors import Misconfigured, Unavailable

# asyncpg's classes are generic in their stubs only.
if TYPE_CHECKING:
    Connection = asyncpg.Connection[asyncpg.Record] | PoolConnectionProxy[asyncpg.Record]
    Pool = asyncpg.Pool[asyncpg.Record]
else:
    Connection, Pool = asyncpg.Connection, asyncpg.Pool

T = TypeVar("T")
# What a connection does first.
First = Callable[[Connection], Coroutine[Any, Any, None]]

OLDEST = 15
# How long a request waits for a free connection before it is told that the database is away (G12: under 2 s).
ACQUIRE_S = 1.5
# How long a transaction that loses conflicts is tried again; a lock wait alone takes lock_timeout.
_CONFLICT_S = 4.0

# What a broken connection or a server that is starting, stopping or full looks like; nothing else may be retried.
AWAY = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.ReadOnlySQLTransactionError,
)
CONFLICT = (asyncpg.DeadlockDetectedError, asyncpg.SerializationError, asyncpg.LockNotAvailableError)

_SESSION = {
    "application_name": "parley",
    "lock_timeout": "2s",
    "idle_in_transaction_session_timeout": "2s",
    # Our statements are few and their plans do not depend on values; planning anew costs 30 µs with 31 partitions.
    "plan_cache_mode": "force_generic_plan",
}


async def open_connection(dsn: str, *, timeout_s: float = 5) -> Connection:
    """One connection of one's own, with the settings that all of ours have. Raises Misconfigured for a bad URL."""
    return await _connect(dsn, timeout=timeout_s, command_timeout=10, server_settings=_SESSION)


async def _connect(dsn: str | None = None, **how: Any) -> "asyncpg.Connection[asyncpg.Record]":
    try:
        return await asyncpg.connect(dsn, **how)
    except ValueError:
        # Not asyncpg's words: they repeat parts of the URL, as of a password with a slash in it.
        raise Misconfigured(
            "database_url",
            "DATABASE_URL (or PARLEY_LISTEN_URL) is no URL of the kind postgresql://user:password@host:5432/name. "
            "In a password / # ? and @ are written %2F %23 %3F and %40.",
        ) from None


async def warm(pool: Pool, connections: int) -> None:
    """Open connections ahead, so that the first burst finds them open."""
    async with AsyncExitStack() as stack:
        for _ in range(connections):
            await stack.enter_async_context(pool.acquire(timeout=ACQUIRE_S))


@asynccontextmanager
async def prompt_connection(pool: Pool, within_s: float = ACQUIRE_S) -> AsyncGenerator[Connection, None]:
    """A connection of the pool for what must be done within so many seconds, waiting for it included.

    Raises TimeoutError otherwise. A connection that did not answer is given up: nobody shall wait for it again, and
    asyncpg would first ask the server that hangs to cancel the statement.
    """
    async with asyncio.timeout(within_s), pool.acquire() as connection:
        try:
            yield connection
        except (TimeoutError, asyncio.CancelledError):
            connection.terminate()
            raise


async def roll_back(connection: Connection) -> None:
    """What a broken transaction needs; a connection that cannot even do that is given up."""
    try:
        async with asyncio.timeout(2):
            await connection.execute("rollback")
    except (*AWAY, asyncio.CancelledError):
        connection.terminate()


async def open_pool(dsn: str, size: int, *, first: First | None = None) -> Pool:
    """A pool of at most `size` connections; opened when first needed; it survives restarts of the server."""
    return await asyncpg.create_pool(
        dsn,
        min_size=0,
        max_size=size,
        timeout=5,
        command_timeout=10,
        server_settings=_SESSION,
        connect=_connect,
        init=first,
        reset=_keep_session,
    )


async def _keep_session(_: Connection) -> None:
    # Nothing of ours sets session state, so the default RESET ALL (35 µs here, 13 µs there) has nothing to undo.
    # asyncpg has rolled back an open transaction before it calls this.
    return None


async def wait_for_database(dsn: str, patience: float, say: Callable[[str], None]) -> None:
    """Return once the server answers and is new enough; `say` hears once per reason why it does not yet.

    Raises Misconfigured at once for what waiting cannot mend (a bad URL, a server too old), and after `patience`
    seconds for everything else.
    """
    deadline = asyncio.get_running_loop().time() + patience
    pause, said = 0.1, ""
    while (reason := await _not_ready(dsn)) is not None:
        left = deadline - asyncio.get_running_loop().time()
        if left <= 0:
            raise Misconfigured("database_unreachable", f"Gave up after {patience:g} s: {reason}")
        if reason != said:
            say(f"Waiting for PostgreSQL: {reason}")
            said = reason
        await asyncio.sleep(min(pause, left))
        pause = min(pause * 1.6, 3)


async def _not_ready(dsn: str) -> str | None:
    try:
        connection = await open_connection(dsn)
    except (*AWAY, asyncpg.PostgresError) as error:
        if isinstance(error, asyncpg.ProtocolViolationError) and "startup parameter" in str(error):
            raise _pooler() from None
        return why(error)
    try:
        major = connection.get_server_version().major
        if major < OLDEST:
            raise Misconfigured("database_old", f"PostgreSQL {major} is too old: Parley needs {OLDEST} or newer.")
        await refuse_pooler(dsn, connection)
    except (*AWAY, asyncpg.PostgresError) as error:
        return why(error)
    finally:
        connection.terminate()
    return None


async def refuse_pooler(dsn: str, connection: Connection) -> None:
    """Raises Misconfigured where a pooler stands before PostgreSQL and a session is not ours alone (D12).

    It drops the settings that bound how long we wait for locks, or gives one server process to two of our connections:
    then session locks and LISTEN are nobody's.
    """
    try:
        kept = await _keeps_session(dsn, connection)
    except (asyncpg.DuplicatePreparedStatementError, asyncpg.InvalidSQLStatementNameError):
        kept = False  # somebody else prepared statements on what we took for ours
    if not kept:
        raise _pooler()


async def _keeps_session(dsn: str, connection: Connection) -> bool:
    if await connection.fetchval("show lock_timeout") != _SESSION["lock_timeout"]:
        return False
    backend = await connection.fetchval("select pg_backend_pid()")
    if backend == connection.get_server_pid():
        return True
    # A pooler answers with a number of its own where PostgreSQL names its process. This connection is idle now: in
    # transaction mode the next one is given its process.
    other = await open_connection(dsn)
    try:
        return bool(await other.fetchval("select pg_backend_pid()") != backend)
    finally:
        other.terminate()


def _pooler() -> Misconfigured:
    return Misconfigured(
        "database_pooler",
        "A connection pooler (PgBouncer?) stands between here and PostgreSQL and keeps no session of ours. Name the "
        "host and port of PostgreSQL itself in DATABASE_URL: each replica has some connections of its own.",
    )


def why(error: Exception) -> str:
    """One sentence for an operator: what is wrong with the database and what to do about it."""
    match error:
        case asyncpg.InvalidPasswordError() | asyncpg.InvalidAuthorizationSpecificationError():
            return "it refuses the user or password in DATABASE_URL; correct them."
        case asyncpg.InvalidCatalogNameError():
            return "the database named in DATABASE_URL does not exist; create it with `createdb`."
        case asyncpg.TooManyConnectionsError():
            return "it has no connection left; raise max_connections or lower PARLEY_POOL_SIZE."
        case asyncpg.CannotConnectNowError():
            return "it is starting up or shutting down."
        case asyncpg.DiskFullError():
            return "its disk is full."
        case asyncpg.ReadOnlySQLTransactionError():
            return "it is read-only (a standby?); name the primary in DATABASE_URL."
        case ConnectionRefusedError():
            return "nothing listens at the host and port of DATABASE_URL; start it or correct the URL."
        case TimeoutError():
            return "it does not answer in time; check the network between here and there."
        case OSError():
            return f"it cannot be reached ({error.strerror or type(error).__name__}); check the host in DATABASE_URL."
        case _:
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no detail'}"


async def retry_conflicts(work: Callable[[], Awaitable[T]]) -> T:
    """Run a whole transaction again when it lost a deadlock, a serialization conflict or a lock wait (D11).

    Raises Unavailable when it keeps losing, or when the database is away.
    """
    give_up_at, pause = monotonic() + _CONFLICT_S, 0.02
    while True:
        try:
            return await work()
        except CONFLICT as error:
            if monotonic() + pause > give_up_at:
                raise Unavailable(
                    "database_busy", "Others hold the rows this needs; try again.", retry_after=1
                ) from error
        except AWAY as error:
            raise Unavailable("database_unavailable", f"The database is away: {why(error)}", retry_after=2) from error
        await asyncio.sleep(pause)
        pause *= 2


class Leadership:
    """Who among all processes does what only one should: the holder of an advisory lock, on a connection of its own.

    Only the holder keeps its connection; a killed holder's lock frees itself. What a holder does must bear a second
    one for a moment, as no lock on a connection can tell when it is lost.
    """

    def __init__(self, dsn: str, key: int) -> None:
        self._dsn = dsn
        self._key = key
        self._connection: Connection | None = None

    async def held(self) -> bool:
        """Whether it is ours now, after trying to get it."""
        if self._connection is not None:
            try:
                await self._connection.fetchval("select 1")
                return True
            except AWAY:
                self.give_up()
        connection = await open_connection(self._dsn)
        try:
            if await connection.fetchval("select pg_try_advisory_lock($1)", self._key):
                self._connection = connection
        finally:
            if self._connection is None:
                await connection.close()
        return self._connection is not None

    def give_up(self) -> None:
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None
