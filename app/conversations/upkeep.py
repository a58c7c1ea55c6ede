"""The index as a whole: made, filled, emptied, built anew and looked at. One does it at a time, on all replicas."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime

import structlog

from app.access import audit
from app.access.audit import Actor
from app.conversations import message_words
from app.conversations import rebuild as rebuilding
from app.conversations.index import OWN
from app.conversations.listing import require_index
from app.conversations.message_words import Status
from app.conversations.passes import Passes
from app.conversations.rebuild import VERSION
from app.conversations.recount import MOST_FAILED, Failed, Recounted, recount
from app.conversations.replacement import LONG_S
from app.conversations.sources.source import all_sources
from app.errors import Conflict, Unavailable
from app.postgres import AWAY, Connection, Pool, open_connection, retry_conflicts, why

log = structlog.get_logger(__name__)

_LOCK = 0x7061_726C_6579_0004
_TAKE = "select pg_try_advisory_lock($1)"
_FREE = "select pg_advisory_unlock_all()"
_BUSY = """
select exists (select from pg_locks where locktype = 'advisory' and granted and objsubid = 1
    and database = (select oid from pg_database where datname = current_database())
    and classid::bigint = $1::bigint >> 32 and objid::bigint = $1::bigint & 4294967295)
"""
_INIT = """
update conversation_index set is_there = true, version = $1, changed_at = parley_now() where not is_there returning 1
"""
# Days of our own chats stay: nothing could count them anew.
_EMPTY = [
    # First of all: a pass that is under way counts no more after that.
    "delete from conversation_source_state",
    "delete from conversation_rounds",
    f"delete from conversation_days where source <> '{OWN}'",
    "set local lock_timeout = '1s'",
    "truncate conversations, conversation_words, conversation_counts, message_words, message_word_users",
    """
    update conversation_index set is_there = false, synced_at = null, changed_at = parley_now(),
        message_words_version = 0, message_words_filled_at = null
    """,
]
_SYNCED = "update conversation_index set synced_at = parley_now()"
_STATS = """
select is_there as "exists", version, synced_at,
    (select coalesce(sum(conversations), 0)::bigint from conversation_counts) as conversations,
    pg_total_relation_size('conversations') + pg_total_relation_size('conversation_words') as size
from conversation_index
"""
_SOURCES = """
select source, sum(conversations)::bigint as conversations from conversation_counts group by source order by source
"""
_OWN_STATS = """
select i.is_there as "exists", i.version, i.synced_at, count(c.id) as conversations,
    coalesce(sum(pg_column_size(c.*)), 0)::bigint as size
from conversation_index i left join conversations c on c.username = $1 group by 1, 2, 3
"""
_OLD = "select version < $1 from conversation_index where is_there"


@dataclass(frozen=True, slots=True)
class Progress:
    """What is under way, and how far: `done` of `of`; of nothing where that is not known."""

    phase: str
    done: int
    of: int


Tell = Callable[[Progress], None]


@dataclass(slots=True)
class Discovered:
    """What passes over the sources have found: messages, conversations with news, and rows without a conversation."""

    messages: int = 0
    found: int = 0
    skipped: int = 0
    failed: list[Failed] = field(default_factory=list)


# One pass over each source.
Discover = Callable[[Tell], Awaitable[Discovered]]


async def no_sources(_: Tell) -> Discovered:
    return Discovered()


async def each_source(passes: Passes, tell: Tell) -> Discovered:
    """A pass over each source that is switched on, in bounded time; what it has not come to is for the next one."""
    await passes.forget()
    async with passes.pool.acquire() as connection:
        sources = [source for source in await all_sources(connection) if source.enabled]
    done = Discovered()
    for number, source in enumerate(sources):
        tell(Progress("sources", number, len(sources)))
        result = await passes.run(source)
        done.messages += result.found.rows
        done.found += result.found.sessions
        done.skipped += result.found.skipped.total()
        if result.is_busy or result.error_code:
            done.failed.append(Failed(source.id, "", result.error or "somebody else is at it"))
    return done


@dataclass(frozen=True, slots=True)
class Stats:
    """`size` in bytes; of a user's own rows without what their indexes take. `sources` by their codes. `messages`: how
    far all messages can be searched.
    """

    exists: bool
    version: int
    synced_at: datetime | None
    conversations: int
    size: int
    sources: Mapping[str, int] = field(default_factory=dict)
    messages: Status | None = None


@dataclass(frozen=True, slots=True)
class Synced:
    """What a sync has done. `failed` are at most a hundred of `failures`; `skipped` are rows without a conversation."""

    began: datetime
    ended: datetime
    messages: int
    found: int
    indexed: int
    skipped: int
    failures: int
    failed: list[Failed]


@asynccontextmanager
async def alone(dsn: str) -> AsyncGenerator[Connection, None]:
    """A connection of one's own, while nobody else looks after the index. Whoever is killed frees it.

    Raises Conflict where somebody does, and Unavailable where the database is away.
    """
    try:
        connection = await open_connection(dsn)
    except AWAY as error:
        raise Unavailable("database_unavailable", f"The database is away: {why(error)}", retry_after=2) from error
    try:
        if not await connection.fetchval(_TAKE, _LOCK):
            raise _running()
        yield connection
    except AWAY as error:
        raise Unavailable("database_unavailable", f"The database went away: {why(error)}", retry_after=2) from error
    finally:
        try:
            with suppress(*AWAY):
                # Whoever comes next shall not wait until the server has noticed that the connection is gone.
                await connection.execute(_FREE, timeout=2)
        finally:
            # Not close(): what was cancelled in mid statement may refuse another one, and a close, too.
            connection.terminate()


async def require_free(connection: Connection) -> None:
    """Raises Conflict where somebody looks after the index just now."""
    if await connection.fetchval(_BUSY, _LOCK):
        raise _running()


def _running() -> Conflict:
    return Conflict("sync_running", "A sync or a rebuild of the index is under way; try again when it has ended.")


async def init(connection: Connection) -> bool:
    """Have an index, empty but for what is saved from now on; false where there is one."""
    return await connection.fetchval(_INIT, VERSION) is not None


async def delete(connection: Connection, actor: Actor) -> bool:
    """Empty the index in one transaction; false where there was none. Called by one at a time.

    Messages go on being saved. Raises Unavailable where its tables were never free for a moment.
    """
    await rebuilding.clean_up(connection)

    async def work() -> bool:
        async with connection.transaction():
            was_there: bool = await connection.fetchval("select is_there from conversation_index")
            for statement in _EMPTY:
                await connection.execute(statement, timeout=LONG_S)
            await audit.note(connection, actor, "index.delete", target="index")
        return was_there

    return await retry_conflicts(work)


async def sync(connection: Connection, tell: Tell = lambda _: None, *, discover: Discover = no_sources) -> Synced:
    """Count our own conversations anew, then one pass over each source. Called by one at a time.

    Raises Conflict where the index was deleted.
    """
    await require_index(connection)
    await rebuilding.clean_up(connection)
    began = datetime.now(UTC)

    def told(done: Recounted) -> None:
        tell(Progress("recount", done.found, done.of))

    own = await recount(connection, told)
    theirs = await discover(tell)
    await connection.execute(_SYNCED)
    tell(Progress("done", own.found, own.of))
    done = Synced(
        began=began,
        ended=datetime.now(UTC),
        messages=own.messages + theirs.messages,
        found=own.found + theirs.found,
        indexed=own.written + theirs.found,
        skipped=theirs.skipped,
        failures=own.failures + len(theirs.failed),
        failed=[*theirs.failed, *own.failed][:MOST_FAILED],
    )
    log.info("index_synced", found=done.found, written=done.indexed, skipped=done.skipped, failed=done.failures)
    return done


async def reset(connection: Connection, actor: Actor, tell: Tell = lambda _: None) -> Stats:
    """Build the index anew beside the old one and swap. Called by one at a time."""
    rebuilt = await rebuilding.rebuild(connection, lambda now: tell(Progress(now.phase, now.done, now.of)))
    await audit.note(connection, actor, "index.reset", target="index")
    log.info("index_rebuilt", conversations=rebuilt.conversations.total(), messages=rebuilt.messages)
    return await stats(connection)


async def stats(connection: Connection, username: str | None = None) -> Stats:
    """Of the whole index, or of one user's conversations."""
    if username is not None:
        row = await connection.fetchrow(_OWN_STATS, username)
        assert row is not None
        return Stats(**row)
    row = await connection.fetchrow(_STATS)
    assert row is not None
    sources = {found[0]: found[1] for found in await connection.fetch(_SOURCES)}
    return Stats(**row, sources=sources, messages=await message_words.status(connection))


@dataclass(frozen=True, slots=True)
class Upkeep:
    """What the leader does: take away what a killed rebuild has left, and build an index of an older schema anew."""

    pool: Pool
    dsn: str

    async def run_once(self) -> int:
        """Returns 1 where there was something to do."""
        # A look is not taken alone: who asks for a sync then would be told that one is under way.
        async with self.pool.acquire() as connection:
            if not (await _is_old(connection) or await rebuilding.is_left(connection)):
                return 0
        try:
            async with alone(self.dsn) as connection:
                if await _is_old(connection):
                    rebuilt = await rebuilding.rebuild(connection)
                    log.info("index_rebuilt", conversations=rebuilt.conversations.total(), messages=rebuilt.messages)
                    return 1
                return int(await rebuilding.clean_up(connection))
        except Conflict:
            return 0


async def _is_old(connection: Connection) -> bool:
    return await connection.fetchval(_OLD, VERSION) is True
