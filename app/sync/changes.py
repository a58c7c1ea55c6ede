"""The one exchange: what a device pushes is applied, and what it has not seen is read, in one transaction.

Everything here happens under the user's row of `sync_head` or after a look at it: commits come in the order of `seq`.
"""

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import asyncpg
import orjson

from app.chats.head import moved
from app.errors import Unavailable
from app.postgres import Connection, retry_conflicts
from app.streams.replicas import Fenced, Replica
from app.sync import pages, rows
from app.sync.cursor import Cursor
from app.sync.devices import acked_of, known_mid, noted, remember
from app.sync.exchange import Answer, Asked, Head, Mutation, Pushed, Resync
from app.sync.merge import Op, State
from app.sync.mutations import Work
from app.wall import Wall

T = TypeVar("T")
# Operations under one number: a page ends between two numbers, so all rows of one have to fit into it.
MOST_OPS = 100

_ACTIVE = """
    (select json_agg(json_build_array(s.id, s.streaming_session_id)) from conversation_sessions s
     where s.user_id = $1 and s.status = 'active') as active
"""
_COUNTER = """
    epoch, seq, gc_seq, gc_failed, clients, now() as at, (extract(epoch from parley_now()) * 1000)::bigint as now_ms
"""
_HEAD = f"select {_COUNTER}, {_ACTIVE} from sync_head where user_id = $1"
_LOCK = f"select {_COUNTER} from sync_head where user_id = $1 for update"
# A statement of its own, after the lock: the one that waits for it sees of other tables what was before.
_LOOK = f"select {_ACTIVE}, {pages.UNSEEN}, {rows.found('$6::text[]')}"
_MAKE = "insert into sync_head (user_id) values ($1) on conflict do nothing"
_NOTE = "update sync_head set clients = $2 where user_id = $1"
_MOVE = "update sync_head set seq = $2 where user_id = $1"
# What was there before devices were, and what replicas of the version before have written since.
_ADOPT = """
with new as (
    select id, row_number() over (order by created_at, position) as n from messages where user_id = $1 and seq = 0),
adopted as (
    update messages m set seq = $2 + new.n,
        stamp = lpad(to_hex((extract(epoch from m.created_at) * 1000)::bigint), 12, '0') || '-0000'
    from new where m.user_id = $1 and m.id = new.id returning 1)
select count(*) from adopted
"""
_ADOPT_CHATS = """
with new as (select id, row_number() over (order by created_at) as n from chats where user_id = $1 and seq = 0),
adopted as (
    update chats c set seq = $2 + new.n from new where c.user_id = $1 and c.id = new.id returning 1)
select count(*) from adopted
"""


# What the gateway does to chats: told under the lock, with the server's time in milliseconds.
OpsOf = Callable[[Connection, int], Awaitable[Sequence[Op]]]


@dataclass(frozen=True, slots=True)
class Written:
    """What the gateway's own operations were about, as it is now, and the ids of what they changed."""

    state: State
    chats: Collection[str]
    messages: Collection[str]


class Changes:
    """Of all users, on one replica."""

    def __init__(self, replica: Replica, wall: Wall) -> None:
        self._replica = replica
        self._wall = wall

    async def exchange(self, user_id: str, asked: Asked) -> Answer:
        """Apply, then read. Raises Conflict for a gap or an unknown device, Unavailable where nothing can be written.

        Any number of times with the same effect.
        """
        if asked.push:
            self._replica.admit()
        elif (answer := await self._read(user_id, asked)) is not None:
            return answer
        return await _until_written(lambda: self._write(user_id, asked))

    async def write(
        self, user_id: str, ops_of: OpsOf, *, dated: bool = False, failed: bool = False, noted: bool = True
    ) -> Written:
        """What somebody without a device does, in one transaction: merged like any push and sent to every device.

        `ops_of` is asked under the lock, once for each try. With `dated`, messages came when their stamps say, and not
        now; `noted`: chats that go are noted in the audit. Raises what it raises, and Unavailable as `exchange`.
        """
        self._replica.admit()
        return await _until_written(lambda: self._do(user_id, ops_of, dated=dated, failed=failed, noted=noted))

    async def note(self, user_id: str, client: str, *, told: int | None, has: int | None) -> None:
        """Up to where a device was told, and has shown to have it, for those that do not keep it; None: no news."""
        given = {name: seq for name, seq in (("told", told), ("has", has)) if seq is not None}
        async with self._wall.connection() as connection:
            head = await _head(connection, user_id)
        if head is None or noted(head, client, given):
            await _until_written(lambda: self._note(user_id, client, given))

    async def _note(self, user_id: str, client: str, given: Mapping[str, int]) -> None:
        async with self._replica.transaction(wall=self._wall) as connection:
            head = await self._locked(connection, user_id)
            if noted(head, client, given):
                await connection.execute(_NOTE, user_id, orjson.dumps(head.clients).decode())

    async def _read(self, user_id: str, asked: Asked) -> Answer | None:
        """The answer to who pushes nothing; None where something has to be written for it: before a bootstrap."""
        async with self._wall.connection() as connection:
            head = await _head(connection, user_id)
            if head is None or _start(head, asked)[1] == 0:
                return None
            return await _answer(connection, user_id, asked, head, Pushed())

    async def _write(self, user_id: str, asked: Asked) -> Answer:
        async with self._replica.transaction(wall=self._wall) as connection:
            head = await self._locked(connection, user_id)
            found = await _look(connection, user_id, asked, head)
            pushed = await _push(connection, user_id, asked, head, found) if asked.push else Pushed()
            if _start(head, asked)[1] == 0:
                await _adopt(connection, user_id, head)
            return await _answer(connection, user_id, asked, head, pushed)

    async def _do(self, user_id: str, ops_of: OpsOf, *, dated: bool, failed: bool, noted: bool) -> Written:
        async with self._replica.transaction(wall=self._wall) as connection:
            head = await self._locked(connection, user_id)
            ops = await ops_of(connection, head.now_ms)
            work = Work(Asked(failed=failed), head, await rows.load(connection, user_id, ops))
            for first in range(0, len(ops), MOST_OPS):
                work.apply(Mutation(0, ops[first : first + MOST_OPS]))
            if work.marks:
                await work.save(connection, user_id, dated=dated)
                if noted:
                    await work.note_gone(connection, user_id)
            return Written(work.found.state, work.marks.chats.keys(), work.marks.messages.keys())

    async def _locked(self, connection: Connection, user_id: str) -> Head:
        row = await connection.fetchrow(_LOCK, user_id)
        if row is None:
            await connection.execute(_MAKE, user_id)
            row = await connection.fetchrow(_LOCK, user_id)
        assert row is not None
        return _head_of(row)


async def _until_written(work: Callable[[], Awaitable[T]]) -> T:
    try:
        return await retry_conflicts(work)
    except Fenced:
        raise Unavailable("replica_lost", "The server is recovering; send it again.", retry_after=2) from None


async def _head(connection: Connection, user_id: str) -> Head | None:
    row = await connection.fetchrow(_HEAD, user_id)
    if row is None:
        return None
    head = _head_of(row)
    head.active = orjson.loads(row["active"] or b"[]")
    return head


def _head_of(row: asyncpg.Record) -> Head:
    given = (row["epoch"], row["seq"], row["gc_seq"], row["gc_failed"], orjson.loads(row["clients"]))
    return Head(*given, row["at"], row["now_ms"])


async def _look(connection: Connection, user_id: str, asked: Asked, head: Head) -> rows.Found:
    """Whatever an exchange has to know, once it has the lock."""
    ops = [op for mutation in asked.push for op in mutation.ops]
    chats, messages = rows.named(ops)
    seen = asked.cursor.seq if asked.cursor else 0
    # What is repeated is told as it is now, so with its text.
    acked = known_mid(head, asked)
    repeated = {op.id for mutation in asked.push if mutation.mid <= acked for op in mutation.ops}
    gone = rows.deleted(ops) - repeated
    values = (list(chats), list(messages), seen, asked.client or pages.NO_CLIENT, list(gone))
    row = await connection.fetchrow(_LOOK, user_id, *values)
    assert row is not None
    head.active = orjson.loads(row["active"] or b"[]")
    if asked.cursor is not None and not asked.cursor.until and _start(head, asked)[1]:
        head.unseen = (row["unseen_chats"], row["unseen_messages"])
    found = rows.Found()
    found.add(row)
    await rows.load_more(connection, user_id, ops, found)
    return found


def _compacted(head: Head, asked: Asked) -> int:
    """How far rows are gone without a word that this device may have."""
    return max(head.gc_seq, head.gc_failed) if asked.failed else head.gc_seq


def _start(head: Head, asked: Asked) -> tuple[Resync | None, int]:
    """Why a device has to begin anew, and its cursor's `until`, where 0 is a bootstrap from nothing."""
    cursor = asked.cursor
    if not asked.pull:
        return None, 1
    if cursor is None or (asked.failed and not cursor.failed):
        return None, 0
    if cursor.epoch != head.epoch:
        return "epoch", 0
    if max(cursor.seq, cursor.until) > head.seq:
        return "ahead", 0
    # In a bootstrap: since it began.
    compacted = _compacted(head, asked)
    if cursor.compacted != compacted if cursor.until else cursor.seq < compacted:
        return "compacted", 0
    return None, max(cursor.until, 1)


async def _adopt(connection: Connection, user_id: str, head: Head) -> None:
    before = head.seq
    for statement in (_ADOPT_CHATS, _ADOPT):
        head.seq += await connection.fetchval(statement, user_id, head.seq)
    if head.seq > before:
        await connection.execute(_MOVE, user_id, head.seq)
        moved(user_id, head.seq)


# -- pushing


async def _push(connection: Connection, user_id: str, asked: Asked, head: Head, found: rows.Found) -> Pushed:
    acked = acked_of(head, asked)
    work = Work(asked, head, found)
    for mutation in asked.push:
        if mutation.mid <= acked:
            work.repeat(mutation)
        else:
            work.apply(mutation)
    pushed = work.told()
    if asked.push[-1].mid <= acked:
        return pushed
    remember(head, asked, pushed.results)
    await work.save(connection, user_id)
    await work.note_gone(connection, user_id)
    pushed.did = work.did(acked)
    return pushed


# -- reading


async def _answer(connection: Connection, user_id: str, asked: Asked, head: Head, pushed: Pushed) -> Answer:
    resync, until = _start(head, asked)
    page = await _page(connection, user_id, asked, head, until)
    chats = pushed.chats | {chat.id: chat for chat in page.chats}
    messages = pushed.messages | {message.id: message for message in page.messages}
    known = head.clients.get(asked.client)
    return Answer(
        acked=known["mid"] if known else 0,
        cursor=page.cursor if asked.pull else asked.cursor,
        server_time=head.now_ms,
        chats=list(chats.values()),
        messages=[one for one in messages.values() if asked.failed or one.status != "failed" or one.is_deleted],
        more=page.more,
        bootstrap=until == 0,
        resync=resync,
        results=pushed.results,
        active_streams=await _streams(connection, head.active),
        did=pushed.did,
    )


async def _page(connection: Connection, user_id: str, asked: Asked, head: Head, until: int) -> pages.Page:
    if not asked.pull:
        return pages.Page((), (), Cursor(head.epoch, 0), False)
    cursor = asked.cursor
    if until == 0 or cursor is None:
        cursor = Cursor(head.epoch, 0, head.seq, _compacted(head, asked), asked.failed)
    else:
        cursor = replace(cursor, failed=asked.failed)
    return await pages.read(connection, user_id, cursor, client=asked.client, last=head.seq, unseen=head.unseen)


_LAST_EVENTS = """
select s.id::text as id, coalesce((select max(e.id) from streaming_events e where e.stream_id = s.id), 0) as last
from unnest($1::uuid[]) as s(id)
"""


async def _streams(connection: Connection, active: Sequence[tuple[str, str]]) -> list[Mapping[str, Any]]:
    """Answers in the making, to be followed from any of their events on."""
    if not active:
        return []
    ids = [stream for _, stream in active]
    await connection.execute("select set_config('parley.streams', $1, true)", f"{{{','.join(ids)}}}")
    last = {row["id"]: row["last"] for row in await connection.fetch(_LAST_EVENTS, ids)}
    return [{"chat_id": chat, "streaming_session_id": stream, "last_event_id": last[stream]} for chat, stream in active]
