"""What goes from users' chats after a time: failed messages, and the contents of deleted chats, whose rows stay, empty
and final.

Bounded in rows per transaction, each of which holds one user's `sync_head`; a user whose row somebody else holds comes
later. Devices that cannot have seen what goes begin anew (docs/decisions/0014-sync.md).
"""

from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from app.expiry import Expired, Rows
from app.postgres import CONFLICT, Connection, Pool

# Chats or failed messages of one look, messages of one transaction: so long a user's other writers wait.
_LOOK, _PIECE = 100, 1_000

_OLD = "updated_at < parley_now() - make_interval(secs => {})"
_DUE = """
select user_id, array_agg(id) as ids from (
    select user_id, id from {table} where {only} and {old} order by updated_at limit $2) due
group by user_id order by user_id
"""
_CHATS, _FAILED = "is_deleted and not is_emptied", "status = 'failed' and not is_deleted"
_DUE_CHATS = _DUE.format(table="chats", only=_CHATS, old=_OLD.format("$1"))
_DUE_FAILED = _DUE.format(table="messages", only=_FAILED, old=_OLD.format("$1"))

# Nobody's chats have no such row, nor does it come back for a user who is being erased.
_LOCK = "select from sync_head where user_id = $1 for update skip locked"
_IS_THERE = "select exists (select from sync_head where user_id = $1)"
# Final from here on, whatever is left of it: nothing comes back to half of a chat. A failed message would, by a retry.
_PURGE = f"""
with due as materialized (
    select id, seq from chats where user_id = $1 and id = any($2::text[]) and is_deleted and not is_purged
        and {_OLD.format("$3")} for update),
versions as (delete from chat_versions v using due where v.user_id = $1 and v.chat_id = due.id),
failed as (
    delete from messages m using due where m.user_id = $1 and m.chat_id = due.id and m.status = 'failed'
    returning m.seq),
head as (
    update sync_head set seq = seq + 1,
        gc_seq = greatest(gc_seq, (select max(seq) from due), (select max(seq) from failed))
    where user_id = $1 and exists (select from due) returning seq),
purged as (
    update chats c set is_purged = true, title = '', parent_chat_id = null, branch_from_message_id = null, origin = '',
        seq = coalesce((select seq from head), 0)
    from due where c.user_id = $1 and c.id = due.id returning 1)
select count(*) from purged
"""
_EMPTY = """
with piece as (
    select m.id from messages m join chats c on c.user_id = m.user_id and c.id = m.chat_id
    where c.user_id = $1 and c.id = any($2::text[]) and c.is_purged and not c.is_emptied limit $3),
gone as (delete from messages m using piece where m.user_id = $1 and m.id = piece.id returning m.seq),
head as (
    update sync_head set gc_seq = greatest(gc_seq, (select max(seq) from gone))
    where user_id = $1 and exists (select from gone))
select count(*) from gone
"""
_DONE = """
update chats c set is_emptied = true where user_id = $1 and id = any($2::text[]) and is_purged and not is_emptied
    and not exists (select from messages m where m.user_id = c.user_id and m.chat_id = c.id)
"""
# No row is left to say so, and a retry may still come: those who asked for failed messages begin anew.
_REMOVE = f"""
with gone as (
    delete from messages where user_id = $1 and id = any($2::text[]) and {_FAILED} and {_OLD.format("$3")} returning 1),
head as (
    update sync_head set seq = seq + 1, gc_failed = seq + 1 where user_id = $1 and exists (select from gone))
select count(*) from gone
"""

# Does a piece for one user, whose row is held; returns the rows done.
_Work = Callable[[Connection, str, Sequence[str]], Awaitable[int]]


@dataclass(frozen=True, slots=True)
class DeletedChats:
    """Chats that were deleted so long ago become empty and final. Rows are chats and messages."""

    keep_s: float
    table: str = "chats"
    piece: int = _PIECE

    async def expired(self, pool: Pool, most: int) -> Expired:
        return await Rows("chats", "updated_at", self.keep_s, _CHATS).expired(pool, most)

    async def clean(self, pool: Pool, most: int) -> int:
        return await _each_user(pool, _DUE_CHATS, self.keep_s, most, self.compact)

    async def compact(self, connection: Connection, user_id: str, chats: Sequence[str]) -> int:
        """Purge those of these that are due, and remove a piece of what is left in them."""
        purged: int = await connection.fetchval(_PURGE, user_id, chats, self.keep_s)
        removed: int = await connection.fetchval(_EMPTY, user_id, chats, self.piece)
        if removed < self.piece:
            await connection.execute(_DONE, user_id, chats)
        return purged + removed


@dataclass(frozen=True, slots=True)
class FailedMessages:
    """Messages that failed so long ago, and that nobody tried again with success."""

    keep_s: float
    table: str = "messages"

    async def expired(self, pool: Pool, most: int) -> Expired:
        return await Rows("messages", "updated_at", self.keep_s, _FAILED).expired(pool, most)

    async def clean(self, pool: Pool, most: int) -> int:
        return await _each_user(pool, _DUE_FAILED, self.keep_s, most, self.remove)

    async def remove(self, connection: Connection, user_id: str, messages: Sequence[str]) -> int:
        removed: int = await connection.fetchval(_REMOVE, user_id, messages, self.keep_s)
        return removed


async def _each_user(pool: Pool, due: str, keep_s: float, most: int, work: _Work) -> int:
    done = 0
    async with pool.acquire() as connection:
        for row in await connection.fetch(due, keep_s, min(most, _LOOK)):
            # Who is being erased has rows locked by somebody who holds no `sync_head`: the others have their turn.
            with suppress(*CONFLICT):
                async with connection.transaction():
                    if await held(connection, row["user_id"]):
                        done += await work(connection, row["user_id"], row["ids"])
    return done


async def held(connection: Connection, user_id: str) -> bool:
    """Lock the user's chats until the transaction ends; whether nobody else has them locked."""
    if await connection.fetchrow(_LOCK, user_id) is not None:
        return True
    return not await connection.fetchval(_IS_THERE, user_id)
