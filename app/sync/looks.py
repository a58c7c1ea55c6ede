"""Looks at what exchanges have to know: where a user's changes are, what is stored of what they name, and whether there
is anything that they have not seen.
"""

from collections.abc import Collection, Sequence
from typing import Any

import asyncpg
import orjson

from app.postgres import Connection
from app.sync import pages, rows
from app.sync.answers import is_plain
from app.sync.devices import known_mid
from app.sync.exchange import Asked, Head
from app.sync.merge import Op

_ACTIVE = """
    (select json_agg(json_build_array(s.id, s.streaming_session_id)) from conversation_sessions s
     where s.user_id = $1 and s.status = 'active') as active
"""
_COUNTER = """
    epoch, seq, gc_seq, gc_failed, clients, now() as at, (extract(epoch from parley_now()) * 1000)::bigint as now_ms
"""
HEAD = f"select {_COUNTER}, {_ACTIVE} from sync_head where user_id = $1"
LOCK = f"select {_COUNTER} from sync_head where user_id = $1 for update"
# After the lock: a statement that waits for it sees of other tables what was before.
_SEEN = f"{_ACTIVE}, {pages.UNSEEN}, {rows.found('$6::text[]')}"
_LOOK = f"select {_SEEN}"
# Both at once: what it has seen beside the lock holds good where nobody has written the row since it began. Whoever
# writes a user's chats or messages writes that row.
_LOCK_AND_LOOK = f"""
with head as materialized (select {_COUNTER}, ctid as place from sync_head where user_id = $1 for update)
select epoch, seq, gc_seq, gc_failed, clients, at, now_ms,
    place = (select ctid from sync_head where user_id = $1) as is_current, {_SEEN}
from head
"""
# What one of several deletes another one may look at: with its text.
_NONE = "'{}'::text[]"
_LOOK_TOGETHER = f"select {_ACTIVE}, {pages.SHARED}, {rows.found(_NONE)}"


async def head_now(connection: Connection, user_id: str) -> Head | None:
    row = await connection.fetchrow(HEAD, user_id)
    return None if row is None else whole_head(row)


def whole_head(row: asyncpg.Record) -> Head:
    head = head_of(row)
    head.active = orjson.loads(row["active"] or b"[]")
    return head


def head_of(row: asyncpg.Record) -> Head:
    given = (row["epoch"], row["seq"], row["gc_seq"], row["gc_failed"], orjson.loads(row["clients"]))
    return Head(*given, row["at"], row["now_ms"])


async def at_once(connection: Connection, user_id: str, asked: Asked) -> tuple[Head, rows.Found | None] | None:
    """The lock, and what a push that deletes no message has to know; not that, where it had to wait for others, and
    nothing where the user has no such row yet.
    """
    row = await connection.fetchrow(_LOCK_AND_LOOK, user_id, *_values(asked, ops_of([asked]), ()))
    if row is None:
        return None
    head = head_of(row)
    return head, await _seen(connection, user_id, asked, head, row) if row["is_current"] else None


async def one(connection: Connection, user_id: str, asked: Asked, head: Head) -> rows.Found:
    """Whatever an exchange has to know, once it has the lock."""
    ops = ops_of([asked])
    row = await connection.fetchrow(_LOOK, user_id, *_values(asked, ops, _unread(head, asked, ops)))
    assert row is not None
    return await _seen(connection, user_id, asked, head, row)


def _values(asked: Asked, ops: Sequence[Op], unread: Collection[str]) -> tuple[Any, ...]:
    chats, messages = rows.named(ops)
    seen = asked.cursor.seq if asked.cursor else 0
    return list(chats), list(messages), seen, asked.client or pages.NO_CLIENT, list(unread)


async def _seen(connection: Connection, user_id: str, asked: Asked, head: Head, row: asyncpg.Record) -> rows.Found:
    if is_plain(head, asked):
        head.unseen = (row["unseen_chats"], row["unseen_messages"])
    return await _found(connection, user_id, [asked], head, row)


async def several(
    connection: Connection, user_id: str, those: Sequence[Asked], head: Head
) -> tuple[rows.Found, pages.Shared | None]:
    """The same for several who are in no bootstrap, and what they have not seen."""
    chats, messages = rows.named(ops_of(those))
    seen = min([asked.cursor.seq for asked in those if asked.cursor and asked.pull], default=head.seq)
    row = await connection.fetchrow(_LOOK_TOGETHER, user_id, list(chats), list(messages), seen)
    assert row is not None
    return await _found(connection, user_id, those, head, row), pages.shared(row)


async def _found(
    connection: Connection, user_id: str, those: Sequence[Asked], head: Head, row: asyncpg.Record
) -> rows.Found:
    head.active = orjson.loads(row["active"] or b"[]")
    found = rows.Found()
    found.add(row)
    await rows.load_more(connection, user_id, ops_of(those), found)
    return found


def ops_of(those: Sequence[Asked]) -> list[Op]:
    return [op for asked in those for mutation in asked.push for op in mutation.ops]


def _unread(head: Head, asked: Asked, ops: Sequence[Op]) -> set[str]:
    """Messages whose text nobody needs: they go. What is repeated is told as it is now, so with its text."""
    acked, gone = known_mid(head, asked), rows.deleted(ops)
    return gone and gone - {op.id for mutation in asked.push if mutation.mid <= acked for op in mutation.ops}
