"""The index built anew beside the one that is read, and put in its place, while messages go on being saved.

A trigger writes down whose rows change, from before the snapshot is taken: making it waits for every writer under way,
so that each write is either in the snapshot or on the list. Those on the list are counted again, the last few of them
while nobody else can write. Our own conversations are counted from their messages, all at once; those of other sources
are copied.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic

import asyncpg
import structlog

from app.conversations import words
from app.conversations.index import OWN
from app.conversations.recount import COUNTED, Key
from app.conversations.replacement import LONG_S, Replacement
from app.conversations.tally import Tally
from app.errors import Conflict, Unavailable
from app.postgres import CONFLICT, Connection

log = structlog.get_logger(__name__)

# The schema of the index that this build writes: an index of an older one is built anew.
VERSION = 2

_LEFT = """
select to_regclass('conversations_next') is not null or to_regclass('conversation_changes') is not null
    or exists (select from pg_proc where proname = 'conversation_changed')
"""
_CLEAN = [
    "drop function if exists conversation_changed() cascade",
    "drop table if exists conversation_changes",
    "drop table if exists conversations_next",
]
# As whoever made it, so that nobody who writes to the index needs a right to the list.
_WATCH = [
    "create unlogged table conversation_changes (source text, username text, conversation_id text)",
    """
    create function conversation_changed() returns trigger language plpgsql security definer
    set search_path from current as $$ begin
        if tg_op <> 'DELETE' then
            insert into conversation_changes values (new.source, new.username, new.conversation_id);
        else
            insert into conversation_changes values (old.source, old.username, old.conversation_id);
        end if;
        return null;
    end $$
    """,
    """
    create trigger conversation_changed after insert or update or delete on conversations
    for each row execute function conversation_changed()
    """,
]
# A user's newest conversations lie together: a page of their list is read from a few pages of the table.
_OWN = f"""
with counted as ({{counted}}),
made as (
    insert into {{next}} (id, source, username, conversation_id, chatbot_id, model, client_ip, first_message_at,
        last_message_at, time_source, message_count, total_tokens, first_question, first_question_rank, last_question,
        last_question_rank, created_at, updated_at)
    select coalesce(c.id, nextval('{{ids}}'::regclass)), '{OWN}', k.username, k.conversation_id,
        coalesce(nullif(c.chatbot_id, ''), k.chatbot_id), coalesce(nullif(c.model, ''), k.model),
        coalesce(c.client_ip, ''), k.first_at, k.last_at, 'message', k.messages, k.tokens, k.first_question,
        k.first_rank, k.last_question, k.last_rank, coalesce(c.created_at, k.first_at),
        coalesce(c.updated_at, k.last_at)
    from counted k
    left join conversations c on (c.source, c.username, c.conversation_id) = ('{OWN}', k.username, k.conversation_id)
    where k.messages > 0 order by k.username, k.last_at returning message_count)
select count(*)::int as made, coalesce(sum(message_count), 0)::bigint as messages from made
"""
_FOREIGN = f"""
insert into {{next}} ({{columns}})
select {{columns}} from conversations where source <> '{OWN}' and id > $1 and id <= $2
"""
_PAGE = f"""
select max(id) from (select id from conversations where source <> '{OWN}' and id > $1 order by id limit $2) page
"""
_COPY = """
insert into {next} ({columns})
select {aliased} from unnest($1::text[], $2::text[], $3::text[]) as k(source, username, conversation_id)
join conversations c using (source, username, conversation_id)
"""
_TAKE = """
delete from conversation_changes where ctid = any(array(select ctid from conversation_changes limit $1))
returning source, username, conversation_id
"""
_DROP = """
with gone as (
    delete from {next} c using unnest($1::text[], $2::text[], $3::text[]) as k(source, username, conversation_id)
    where (c.source, c.username, c.conversation_id) = (k.source, k.username, k.conversation_id) returning c.source)
select source, count(*)::int as gone from gone group by source
"""
# Of those that the index says something else of, or that have none; the others are right. What has changed meanwhile is
# done when it is caught up with.
_WORDS = f"""
(select {", ".join(f"n.{column}" for column in words.WRITTEN.split(", "))} from {{next}} n
    left join conversations c using (id) left join conversation_words w on w.conversation = n.id
    where (w.conversation is null or (c.chatbot_id, c.model, c.first_question, c.last_question, w.said_at)
        is distinct from (n.chatbot_id, n.model, n.first_question, n.last_question, n.last_message_at))
    and n.id > $1 and n.id <= $2 and not exists (select from conversation_changes g
        where (g.source, g.username, g.conversation_id) = (n.source, n.username, n.conversation_id))) differing
"""
_WORDS_PAGE = "select max(id) from (select id from {next} where id > $1 order by id limit $2) page"
_WORDS_AGAIN = f"""
(select {", ".join(f"n.{column}" for column in words.WRITTEN.split(", "))} from {{next}} n
    join unnest($1::text[], $2::text[], $3::text[]) as k(source, username, conversation_id)
        using (source, username, conversation_id)
    order by n.source, n.username, n.conversation_id) again
"""
_FORGET = """
delete from conversation_words w where not exists (select from conversations c where c.id = w.conversation)
"""
_ALL = """
select (select count(*) from chats)
    + coalesce((select sum(conversations) from conversation_counts where source <> $1), 0)::bigint
"""
_SOURCES = "select source, count(*)::int as conversations from {next} group by source"
_COUNTS = """
insert into conversation_counts (source, slot, conversations)
select source, 0, conversations from unnest($1::text[], $2::bigint[]) as c(source, conversations)
"""
_DONE = """
update conversation_index set is_there = true, version = $1, synced_at = parley_now(), changed_at = parley_now()
"""

# Rows of other sources of one statement of the fill.
_ROWS = 10_000
# Whoever saves a message waits for the words of so many, where they are written.
_SPOKEN = 2_000
# Changes of one round, how many rounds, and how many may be left for the moment in which everybody waits.
_ROUND, _ROUNDS, _FEW = 2_000, 100, 50
# So many may have come by the time that everybody waits. A conversation that has changed often is counted once, and
# a hundred of them in some ten milliseconds.
_LAST = 2_000
# How long everybody who wants the table may be kept waiting, and how often that is tried.
_LOCK_MS = 200
_PATIENCE_S = 60.0
_PAUSE_S = 0.1
# How long the snapshot may be idle while this process is busy.
_IDLE = "set local idle_in_transaction_session_timeout = '60s'"
_ROOM = "set maintenance_work_mem = '256MB'"
# Who wants the lists meanwhile has a processor, too.
_ALONE = "set max_parallel_maintenance_workers = 0"


@dataclass(slots=True)
class Rebuilt:
    """How far a rebuild is: `phase`, and `done` of so many conversations."""

    phase: str = "read"
    done: int = 0
    of: int = 0
    messages: int = 0
    conversations: Counter[str] = field(default_factory=Counter)


Progress = Callable[[Rebuilt], None]


async def is_left(connection: Connection) -> bool:
    """Whether there is something of a rebuild: of one that is under way, or was killed."""
    return await connection.fetchval(_LEFT) is True


async def clean_up(connection: Connection) -> bool:
    """Take away what a rebuild that was killed has left; whether there was anything. To be called by one at a time."""
    if not await is_left(connection):
        return False
    log.warning("index_rebuild_left")
    await _promptly(connection, lambda: _all(connection, _CLEAN))
    return True


async def rebuild(connection: Connection, progress: Progress = lambda _: None) -> Rebuilt:
    """Build the index anew and swap. To be called by one at a time, on a connection in no transaction.

    Raises Unavailable where its table was never free for a moment; then nothing has changed.
    """
    await clean_up(connection)
    try:
        await connection.execute(_ROOM)
        await connection.execute(_ALONE)
        await _promptly(connection, lambda: _all(connection, _WATCH))
        return await _Rebuild(connection, await Replacement.made(connection, "conversations"), progress).run()
    finally:
        # Nothing is left after a swap. A connection that is gone leaves it to whoever comes next.
        if not connection.is_closed():
            await asyncio.shield(clean_up(connection))


class _Rebuild:
    def __init__(self, connection: Connection, new: Replacement, progress: Progress) -> None:
        self._connection = connection
        self._new = new
        self._state = Rebuilt()
        self._progress = progress
        columns = ", ".join(new.columns)
        aliased = ", ".join(f"c.{column}" for column in new.columns)
        self._tally = Tally(new.schema)
        self._all_own, self._own = [
            _OWN.format(counted=counted, next=new.next, ids=new.ids) for counted in (self._tally.counted, COUNTED)
        ]
        self._foreign = _FOREIGN.format(next=new.next, columns=columns)
        self._copy = _COPY.format(next=new.next, columns=columns, aliased=aliased)
        self._drop = _DROP.format(next=new.next)
        self._words = words.saved(_WORDS.format(next=new.next))
        self._words_again = words.saved(_WORDS_AGAIN.format(next=new.next))

    async def run(self) -> Rebuilt:
        async with self._connection.transaction(isolation="repeatable_read"):
            await self._connection.execute(_IDLE)
            await self._fill()
        self._tell("indexes")
        for index in self._new.indexes:
            await self._new.index(self._connection, index)
        await self._connection.execute(f"vacuum analyze {self._new.next}", timeout=LONG_S)
        await self._find_words()
        self._tell("swap")
        await _promptly(self._connection, self._swap)
        await self._connection.execute(_FORGET, timeout=LONG_S)
        self._tell("done")
        return self._state

    async def _fill(self) -> None:
        self._state.of = await self._connection.fetchval(_ALL, OWN, timeout=LONG_S)
        self._told(0)
        await self._tally.read(self._connection, within_s=LONG_S)
        self._tell("fill")
        self._told(self._counted(await self._connection.fetchrow(self._all_own, timeout=LONG_S)))
        await self._tally.forget(self._connection)
        after = -1
        while (last := await self._connection.fetchval(_PAGE, after, _ROWS)) is not None:
            copied = await self._connection.execute(self._foreign, after, last)
            self._told(int(copied.rpartition(" ")[2]))
            after = last
        rows = await self._connection.fetch(_SOURCES.format(next=self._new.next), timeout=LONG_S)
        self._state.conversations = Counter({row["source"]: row["conversations"] for row in rows})

    async def _find_words(self) -> None:
        page, after = _WORDS_PAGE.format(next=self._new.next), -1
        while (last := await self._connection.fetchval(page, after, _SPOKEN)) is not None:
            await self._connection.execute(self._words, after, last)
            after = last

    def _told(self, done: int) -> None:
        self._state.done += done
        self._progress(self._state)

    def _tell(self, phase: str) -> None:
        self._state.phase = phase
        self._progress(self._state)

    async def _count(self, keys: Sequence[Key]) -> int:
        row = await self._connection.fetchrow(self._own, [key[0] for key in keys], [key[1] for key in keys])
        return self._counted(row)

    def _counted(self, row: asyncpg.Record | None) -> int:
        assert row is not None
        self._state.messages += row["messages"]
        made: int = row["made"]
        return made

    async def _swap(self) -> None:
        """Raises one of CONFLICT where somebody holds the table, or changes more than is caught up with."""
        for _ in range(_ROUNDS):
            if await self._catch_up(_ROUND) <= _FEW:
                break
        counted = self._state.conversations.copy()
        try:
            async with self._connection.transaction():
                await self._connection.execute(f"set local lock_timeout = {_LOCK_MS}")
                await self._connection.execute("lock table conversations in access exclusive mode")
                if await self._catch_up(_LAST) == _LAST:
                    raise CONFLICT[-1]("too much has changed since the last round")
                await self._finish()
        except CONFLICT:
            self._state.conversations = counted
            raise
        except asyncpg.DependentObjectsStillExistError as error:
            detail = f"Something else depends on the table, which can therefore not be replaced: {error.detail}"
            raise Conflict("index_held", detail) from error

    async def _catch_up(self, most: int) -> int:
        """Bring those that have changed since up to date; returns how many changes that were."""
        counts: Counter[str] = Counter()
        async with self._connection.transaction():
            taken = await self._connection.fetch(_TAKE, most)
            if taken:
                counts = await self._again({(row[0], row[1], row[2]) for row in taken})
        self._state.conversations += counts
        return len(taken)

    async def _again(self, keys: set[tuple[str, str, str]]) -> Counter[str]:
        columns = [list(column) for column in zip(*sorted(keys), strict=True)]
        counts: Counter[str] = Counter()
        counts.subtract({row["source"]: row["gone"] for row in await self._connection.fetch(self._drop, *columns)})
        counts[OWN] += await self._count([(key[1], key[2]) for key in sorted(keys) if key[0] == OWN])
        if foreign := [key for key in sorted(keys) if key[0] != OWN]:
            copied = await self._connection.fetch(
                f"{self._copy} returning source", *(list(column) for column in zip(*foreign, strict=True))
            )
            counts.update(row["source"] for row in copied)
        await self._connection.execute(self._words_again, *columns)
        return counts

    async def _finish(self) -> None:
        counts = self._state.conversations
        await self._connection.execute("delete from conversation_counts")
        await self._connection.execute(_COUNTS, list(counts), list(counts.values()))
        await self._new.swap(self._connection)
        await _all(self._connection, _CLEAN[:2])
        await self._connection.execute(_DONE, VERSION)


async def _all(connection: Connection, statements: Sequence[str]) -> None:
    async with connection.transaction():
        await connection.execute(f"set local lock_timeout = {_LOCK_MS}")
        for statement in statements:
            await connection.execute(statement)


async def _promptly(connection: Connection, work: Callable[[], Awaitable[None]]) -> None:
    """Do what keeps everybody waiting for a moment, as soon as nobody has to wait for longer than that."""
    give_up_at = monotonic() + _PATIENCE_S
    while True:
        try:
            return await work()
        except CONFLICT as error:
            if monotonic() > give_up_at:
                detail = "The index was in use all the time; try again when less is asked of it."
                raise Unavailable("index_busy", detail, retry_after=60) from error
        await asyncio.sleep(_PAUSE_S * (1 + random.random()))
