"""The one exchange: what a device pushes is applied, and what it has not seen is read, in one transaction.

Everything here happens under the user's row of `sync_head` or after a look at it: commits come in the order of `seq`.
"""

from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import accumulate
from typing import Any, Literal, TypeVar

import asyncpg
import orjson

from app.access.audit import asker, note
from app.chats.head import moved
from app.conversations import index, recount
from app.conversations.summary import Said, fold
from app.errors import Conflict, Unavailable
from app.postgres import Connection, retry_conflicts
from app.streams.replicas import Fenced, Replica
from app.sync import merge, pages, rows
from app.sync.cursor import Cursor
from app.sync.merge import AddMessage, Chat, Message, Op, State
from app.wall import Wall

T = TypeVar("T")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# What is not there any more.
_NONE = Message("", "", "user", "", is_deleted=True)
_UNKNOWN = Chat("", is_deleted=True)
ChatOp = merge.PutChat | merge.DeleteChat
# Devices known per user, those that pushed last.
MOST_CLIENTS = 100
# Those of them that are told again what became of their last push, and of how many operations.
_TOLD_CLIENTS, _TOLD_OPS = 10, 100
# A device that hears nothing new is noted as seldom, in milliseconds.
_NOTED_MS = 60_000
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

Resync = Literal["epoch", "ahead", "compacted"]


@dataclass(frozen=True, slots=True)
class Mutation:
    """Operations that are applied together or not at all. `altered`: they are not quite as the device said."""

    mid: int
    ops: Sequence[Op]
    altered: bool = False


@dataclass(frozen=True, slots=True)
class Asked:
    """What a device says. Without a `client` it only reads; `failed`: it wants failed messages, and may push some.

    Without `pull` it is told what became of its push alone, and stays where it was.
    """

    client: str = ""
    cursor: Cursor | None = None
    push: Sequence[Mutation] = ()
    failed: bool = False
    pull: bool = True


@dataclass(frozen=True, slots=True)
class Did:
    """What a push has done: mutations that were new, chats and messages written, what became of operations that did not
    become what they said; failed messages that it brought, and those that it has made complete.
    """

    mutations: int = 0
    rows: int = 0
    conflicts: Mapping[merge.Status, int] = field(default_factory=dict)
    failed: int = 0
    mended: int = 0

    def told(self) -> Mapping[str, Any]:
        """What there is of it."""
        return {name: value for name in Did.__slots__ if (value := getattr(self, name))}


@dataclass(frozen=True, slots=True)
class Answer:
    """`acked`: the last mutation of this device that the server has. No `cursor`: it gave none, and pulled nothing."""

    acked: int
    cursor: Cursor | None
    server_time: int
    chats: Sequence[Chat]
    messages: Sequence[Message]
    more: bool
    bootstrap: bool = False
    resync: Resync | None = None
    results: Sequence[Mapping[str, Any]] = ()
    active_streams: Sequence[Mapping[str, Any]] = ()
    did: Did = field(default_factory=Did)


@dataclass(slots=True)
class _Head:
    """The user's row, and what is known of the device that asks."""

    epoch: str
    seq: int
    gc_seq: int
    gc_failed: int
    clients: dict[str, Any]
    at: datetime
    now_ms: int
    active: Sequence[tuple[str, str]] = ()
    # Whether chats and messages have changed that the device has not seen; not known of one that begins anew.
    unseen: tuple[bool, bool] = (True, True)


# What the gateway does to chats: told under the lock, with the server's time in milliseconds.
OpsOf = Callable[[Connection, int], Awaitable[Sequence[Op]]]


@dataclass(frozen=True, slots=True)
class Written:
    """What the gateway's own operations were about, as it is now, and the ids of what they changed."""

    state: State
    chats: Collection[str]
    messages: Collection[str]


@dataclass(slots=True)
class _Pushed:
    """What became of a push: what the device has to be told of, beside what others did."""

    results: list[Mapping[str, Any]] = field(default_factory=list)
    chats: dict[str, Chat] = field(default_factory=dict)
    messages: dict[str, Message] = field(default_factory=dict)
    did: Did = field(default_factory=Did)


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
        if head is None or _noted(head, client, given):
            await _until_written(lambda: self._note(user_id, client, given))

    async def _note(self, user_id: str, client: str, given: Mapping[str, int]) -> None:
        async with self._replica.transaction(wall=self._wall) as connection:
            head = await self._locked(connection, user_id)
            if _noted(head, client, given):
                await connection.execute(_NOTE, user_id, orjson.dumps(head.clients).decode())

    async def _read(self, user_id: str, asked: Asked) -> Answer | None:
        """The answer to who pushes nothing; None where something has to be written for it: before a bootstrap."""
        async with self._wall.connection() as connection:
            head = await _head(connection, user_id)
            if head is None or _start(head, asked)[1] == 0:
                return None
            return await _answer(connection, user_id, asked, head, _Pushed())

    async def _write(self, user_id: str, asked: Asked) -> Answer:
        async with self._replica.transaction(wall=self._wall) as connection:
            head = await self._locked(connection, user_id)
            found = await _look(connection, user_id, asked, head)
            pushed = await _push(connection, user_id, asked, head, found) if asked.push else _Pushed()
            if _start(head, asked)[1] == 0:
                await _adopt(connection, user_id, head)
            return await _answer(connection, user_id, asked, head, pushed)

    async def _do(self, user_id: str, ops_of: OpsOf, *, dated: bool, failed: bool, noted: bool) -> Written:
        async with self._replica.transaction(wall=self._wall) as connection:
            head = await self._locked(connection, user_id)
            ops = await ops_of(connection, head.now_ms)
            work = _Work(Asked(failed=failed), head, await rows.load(connection, user_id, ops))
            for first in range(0, len(ops), MOST_OPS):
                work.apply(Mutation(0, ops[first : first + MOST_OPS]))
            if work.marks:
                await work.save(connection, user_id, dated=dated)
                if noted:
                    await work.note_gone(connection, user_id)
            return Written(work.found.state, work.marks.chats.keys(), work.marks.messages.keys())

    async def _locked(self, connection: Connection, user_id: str) -> _Head:
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


async def _head(connection: Connection, user_id: str) -> _Head | None:
    row = await connection.fetchrow(_HEAD, user_id)
    if row is None:
        return None
    head = _head_of(row)
    head.active = orjson.loads(row["active"] or b"[]")
    return head


def _head_of(row: asyncpg.Record) -> _Head:
    given = (row["epoch"], row["seq"], row["gc_seq"], row["gc_failed"], orjson.loads(row["clients"]))
    return _Head(*given, row["at"], row["now_ms"])


async def _look(connection: Connection, user_id: str, asked: Asked, head: _Head) -> rows.Found:
    """Whatever an exchange has to know, once it has the lock."""
    ops = [op for mutation in asked.push for op in mutation.ops]
    chats, messages = rows.named(ops)
    seen = asked.cursor.seq if asked.cursor else 0
    # What is repeated is told as it is now, so with its text.
    acked = _known_mid(head, asked)
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


def _compacted(head: _Head, asked: Asked) -> int:
    """How far rows are gone without a word that this device may have."""
    return max(head.gc_seq, head.gc_failed) if asked.failed else head.gc_seq


def _start(head: _Head, asked: Asked) -> tuple[Resync | None, int]:
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


async def _adopt(connection: Connection, user_id: str, head: _Head) -> None:
    before = head.seq
    for statement in (_ADOPT_CHATS, _ADOPT):
        head.seq += await connection.fetchval(statement, user_id, head.seq)
    if head.seq > before:
        await connection.execute(_MOVE, user_id, head.seq)
        moved(user_id, head.seq)


# -- pushing


async def _push(connection: Connection, user_id: str, asked: Asked, head: _Head, found: rows.Found) -> _Pushed:
    acked = _acked(head, asked)
    work = _Work(asked, head, found)
    for mutation in asked.push:
        if mutation.mid <= acked:
            work.repeat(mutation)
        else:
            work.apply(mutation)
    pushed = work.told()
    if asked.push[-1].mid <= acked:
        return pushed
    _remember(head, asked, pushed.results)
    await work.save(connection, user_id)
    await work.note_gone(connection, user_id)
    pushed.did = work.did(acked)
    return pushed


def _acked(head: _Head, asked: Asked) -> int:
    """The last mutation of this device that is here. Raises Conflict where those sent do not follow on it."""
    known, acked = head.clients.get(asked.client), _known_mid(head, asked)
    first = asked.push[0].mid
    if known is None and first != 1:
        detail = "The server does not know this device; take a new client id and count from 1."
        raise Conflict("unknown_client", detail)
    if first > acked + 1:
        raise Conflict("gap", f"Mutation {acked + 1} comes next.", expected=acked + 1)
    return acked


def _known_mid(head: _Head, asked: Asked) -> int:
    known = head.clients.get(asked.client)
    return known["mid"] if known else 0


def _remember(head: _Head, asked: Asked, results: Sequence[Mapping[str, Any]]) -> None:
    """How far this device is now, and for when it repeats itself what became of its push: of the first operations, as
    each exchange of the user reads it.
    """
    known = head.clients.get(asked.client, {})
    noted = {name: known[name] for name in ("told", "has") if name in known}
    head.clients[asked.client] = noted | {"mid": asked.push[-1].mid, "at": head.now_ms}
    if few := _few(results):
        head.clients[asked.client]["results"] = few
    _forget(head)


def _few(results: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    many = accumulate(len(result["ops"]) for result in results)
    return [result for result, so_many in zip(results, many, strict=True) if so_many <= _TOLD_OPS]


def _noted(head: _Head, client: str, given: Mapping[str, int]) -> bool:
    """Note what is new about a device; whether there was anything, or for how long there was not."""
    known = head.clients.get(client, {"mid": 0, "at": 0})
    if known | given == known and head.now_ms - known["at"] < _NOTED_MS:
        return False
    head.clients[client] = known | given | {"at": head.now_ms}
    _forget(head)
    return True


def _forget(head: _Head) -> None:
    """Those that were silent for longest, or what became of their pushes."""
    if len(head.clients) > _TOLD_CLIENTS:
        latest = sorted(head.clients, key=lambda client: head.clients[client]["at"], reverse=True)
        for client in latest[_TOLD_CLIENTS:]:
            head.clients[client].pop("results", None)
        for client in latest[MOST_CLIENTS:]:
            del head.clients[client]


@dataclass(slots=True)
class _Work:
    """Mutations, one after the other, on rows in memory. `chats` and `messages`: what the device has to be told of."""

    asked: Asked
    head: _Head
    found: rows.Found
    marks: rows.Marks = field(default_factory=rows.Marks)
    losers: list[Chat] = field(default_factory=list)
    results: list[Mapping[str, Any]] = field(default_factory=list)
    chats: set[str] = field(default_factory=set)
    messages: dict[str, Message] = field(default_factory=dict)
    before: State = field(init=False)

    def __post_init__(self) -> None:
        self.before = State(dict(self.found.state.chats), dict(self.found.state.messages))

    def apply(self, mutation: Mutation) -> None:
        told, before = [], len(self.marks)
        for op in mutation.ops:
            if isinstance(op, AddMessage) and op.status == "failed" and not self.asked.failed:
                continue
            status = self._apply(op, self.head.seq + 1, altered=mutation.altered)
            if status is not None:
                told.append({"id": op.id, "status": status})
        self.head.seq += len(self.marks) > before
        if told:
            self.results.append({"mid": mutation.mid, "ops": told})

    def _apply(self, op: Op, seq: int, *, altered: bool) -> merge.Status | None:
        have = self.found.state.chats.get(op.id) if isinstance(op, ChatOp) else None
        outcome = merge.apply(self.found.state, op, client=self.asked.client, now_ms=self.head.now_ms)
        plain = outcome.plain and not altered
        origin = self.asked.client if plain else ""
        own = isinstance(op, ChatOp)
        self.marks.set(seq, chats=outcome.chats, origin=origin if own else "")
        self.marks.set(seq, messages=outcome.messages, origin=origin)
        if not plain:
            self._name(op)
        if not plain or not own:
            self.chats.update(outcome.chats)
            self.messages |= {} if plain else dict.fromkeys(outcome.messages, _NONE)
        if outcome.loser is not None and (outcome.loser is not have or not self._knew(have)):
            self.losers.append(outcome.loser)
        return outcome.status

    def _knew(self, chat: Chat) -> bool:
        """Whether the device has seen what it replaced: then that did not lose against it, it was followed."""
        cursor, seq = self.asked.cursor, self.found.seqs.get(chat.id, 0)
        if chat.client == self.asked.client:
            return True
        return cursor is not None and cursor.epoch == self.head.epoch and seq <= cursor.seq

    async def save(self, connection: Connection, user_id: str, *, dated: bool = False) -> None:
        """What has become of them, how far everybody is, and the index of conversations.

        With `dated`, new messages came when their stamps say.
        """
        await rows.keep(connection, user_id, self.losers)
        places = rows.place(self.found, self.marks)
        said = _said(user_id, self.before, self.found.state, places=places, at=None if dated else self.head.at)
        folded = fold(said, most_keys=0)
        await rows.write(
            connection,
            user_id,
            self.found,
            self.marks,
            seq=self.head.seq,
            clients=orjson.dumps(self.head.clients),
            brought=index.brought(folded) if folded and not dated else "",
            dated=dated,
        )
        moved(user_id, self.head.seq)
        if dated:
            await index.merge(connection, index.OWN, folded)
        if chats := _uncounted(self.before, self.found.state, said):
            await recount.count_within(connection, [(user_id, chat) for chat in chats])

    async def note_gone(self, connection: Connection, user_id: str) -> None:
        """Put on record which chats are deleted now, and were not."""
        was = self.before.chats
        deleted = (name for name, chat in self.found.state.chats.items() if chat.is_deleted)
        if gone := sorted(name for name in deleted if name in was and not was[name].is_deleted):
            await note(connection, asker(), "chat.delete", target=user_id, detail=f"{len(gone)}: {', '.join(gone)}")

    def did(self, acked: int) -> Did:
        """For figures: what was new in this push."""
        found, before = self.found.state.messages, self.before.messages
        failed = {name for name in self.marks.messages if _is_failed(found[name])}
        mended = {name for name in self.marks.messages if _is_failed(before.get(name))} - failed
        rows_written = len(self.marks.chats) + len(self.marks.messages)
        conflicts = Counter(op["status"] for result in self.results if result["mid"] > acked for op in result["ops"])
        return Did(self.asked.push[-1].mid - acked, rows_written, conflicts, len(failed - before.keys()), len(mended))

    def repeat(self, mutation: Mutation) -> None:
        """The device did not hear what became of it: it is told what is there now."""
        for op in mutation.ops:
            self._name(op)
        known = self.head.clients[self.asked.client].get("results", [])
        self.results.extend(result for result in known if result["mid"] == mutation.mid)

    def _name(self, op: Op) -> None:
        if isinstance(op, ChatOp):
            self.chats.add(op.id)
        else:
            self.messages[op.id] = Message(op.id, getattr(op, "chat_id", ""), "user", "", is_deleted=True)

    def told(self) -> _Pushed:
        """As it is after all of them. What is not there any more is told as deleted."""
        chats, messages = self.found.state.chats, self.found.state.messages
        return _Pushed(
            self.results,
            {name: chats[name] for name in self.chats if name in chats},
            {name: messages.get(name, gone) for name, gone in self.messages.items()},
        )


def _said(user_id: str, before: State, after: State, *, places: Mapping[str, int], at: datetime | None) -> list[Said]:
    """What is new for the index of conversations. Without `at`, messages came when their stamps say."""
    return [
        Said(
            message.chat_id,
            user_id,
            places[name],
            name,
            _SAYS[message.role],
            at or _moment(message),
            question=_question(message),
        )
        for name, message in after.messages.items()
        if _counts(message) and not _counts(before.messages.get(name))
    ]


def _uncounted(before: State, after: State, said: Sequence[Said]) -> list[str]:
    """Chats that have to be counted anew: something has gone or come back."""
    gone = {one.chat_id for name, one in before.messages.items() if _counts(one) and after.messages[name].is_deleted}
    turned = {name for name, chat in after.chats.items() if chat.is_deleted != _is_deleted(before.chats.get(name))}
    # A retry may name another chat than that of the message that failed, of which nothing is known here then.
    hidden = {one.conversation_id for one in said if _is_deleted(after.chats.get(one.conversation_id, _UNKNOWN))}
    return sorted(gone | turned | hidden)


_SAYS: Mapping[str, Literal["user", "assistant", "other"]] = {
    "user": "user",
    "assistant": "assistant",
    "system": "other",
}


def _question(message: Message) -> str:
    return message.content if message.role == "user" else ""


def _moment(message: Message) -> datetime:
    return _EPOCH + timedelta(milliseconds=merge.ms_of(message.stamp))


def _counts(message: Message | None) -> bool:
    return message is not None and not message.is_deleted and message.status != "failed"


def _is_failed(message: Message | None) -> bool:
    return message is not None and message.status == "failed" and not message.is_deleted


def _is_deleted(chat: Chat | None) -> bool:
    return chat is not None and chat.is_deleted


# -- reading


async def _answer(connection: Connection, user_id: str, asked: Asked, head: _Head, pushed: _Pushed) -> Answer:
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


async def _page(connection: Connection, user_id: str, asked: Asked, head: _Head, until: int) -> pages.Page:
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
