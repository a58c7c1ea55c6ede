"""Chats and messages as a push reads and writes them, all of them at once. app/chats/store.py writes those of runs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import asyncpg
import orjson

from app.conversations import index
from app.errors import TooLarge
from app.postgres import Connection
from app.sync.merge import (
    AddMessage,
    Chat,
    DeleteMessage,
    Message,
    Op,
    State,
    fork,
    ms_of,
    successor,
)

# Versions of a chat that are kept, the last ones.
_VERSIONS = 20

CHAT = "id, title, parent_chat_id, branch_from_message_id, stamp, client, is_deleted, is_purged"
MESSAGE = "id, chat_id, role, content, parent_id, attachments, status, stamp, is_deleted"

# Stored text that one push may have read, with attachments: what it names may be much larger than itself.
_MOST_BYTES = 64 << 20
_WITHIN = f"sum(octet_length(content) + octet_length(attachments)) over (order by id) <= {_MOST_BYTES}"
_BOUNDED = MESSAGE.replace("content,", f"case when {_WITHIN} then content end as content,").replace(
    "attachments,", f"case when {_WITHIN} then attachments end as attachments,"
)
_EMPTIED = MESSAGE.replace("content,", "case when id = any({gone}) then '' else content end as content,").replace(
    "attachments,", "case when id = any({gone}) then '[]' else attachments end as attachments,"
)
# Each by its key, whatever the planner thinks of how many rows a user has: some have a thousand times as many as
# others. With chats the last position in them, also where there is no such chat. `{gone}`: messages whose text nobody
# needs, as they are going to be deleted.
_FOUND = f"""
    (select json_agg(found) from (
        select k.id as name, last.position, c.*
        from unnest($2::text[]) as k(id)
        left join lateral (select {CHAT}, seq from chats where user_id = $1 and id = k.id offset 0) c on true
        cross join lateral (
            select coalesce(max(position), 0) as position from messages where user_id = $1 and chat_id = k.id) last
    ) found) as chats,
    (select json_agg(m) from (
        select {_BOUNDED}, position from (select m.* from unnest($3::text[]) as k(id) cross join lateral (
            select {_EMPTIED}, position from messages where user_id = $1 and id = k.id offset 0) m) m) m) as messages
"""


def found(gone: str) -> str:
    """SQL: what the chats $2 and the messages $3 of the user $1 are; `gone`: those that are going to be deleted."""
    return _FOUND.format(gone=gone)


_FIND = "select " + found("'{}'::text[]")
_WRITTEN = """
with head as (
    update sync_head set seq = $2, clients = $3 where user_id = $1),
chat as (
    insert into chats (user_id, id, title, parent_chat_id, branch_from_message_id, stamp, client, is_deleted, is_purged,
        "timestamp", seq, origin)
    select $1, id, title, parent_chat_id, branch_from_message_id, stamp, client, is_deleted, is_purged,
        to_timestamp(ms / 1000.0), seq, origin
    from json_to_recordset($4::json) as c(id text, title text, parent_chat_id text, branch_from_message_id text,
        stamp text, client text, is_deleted bool, is_purged bool, ms bigint, seq bigint, origin text)
    order by id
    on conflict (user_id, id) do update set title = excluded.title, parent_chat_id = excluded.parent_chat_id,
        branch_from_message_id = excluded.branch_from_message_id, stamp = excluded.stamp, client = excluded.client,
        is_deleted = excluded.is_deleted, is_emptied = chats.is_emptied and chats.is_purged, seq = excluded.seq,
        origin = excluded.origin, updated_at = now()),
message as (
    insert into messages (user_id, id, chat_id, role, content, parent_id, attachments, status, stamp, is_deleted,
        position, "timestamp", seq, origin, is_asked, created_at)
    select $1, id, chat_id, role, content, parent_id, attachments, status, stamp, is_deleted, position,
        to_timestamp(ms / 1000.0), seq, origin, false, case when $6 then to_timestamp(ms / 1000.0) else now() end
    from json_to_recordset($5::json) as m(id text, chat_id text, role text, content text, parent_id text,
        attachments text, status text, stamp text, is_deleted bool, position int, ms bigint, seq bigint, origin text)
    order by id
    on conflict (user_id, id) do update set role = excluded.role, content = excluded.content,
        parent_id = excluded.parent_id, attachments = excluded.attachments, status = excluded.status,
        stamp = excluded.stamp, is_deleted = excluded.is_deleted, seq = excluded.seq, origin = excluded.origin,
        created_at = case when messages.status = 'failed' and excluded.status <> 'failed' then excluded.created_at
            else messages.created_at end,
        updated_at = now())
"""
_WRITE = f"{_WRITTEN} select"
_BRING = f"{_WRITTEN}, {index.bringing('$7')}"
_KEEP = """
insert into chat_versions (user_id, chat_id, stamp, client, title, parent_chat_id, branch_from_message_id)
select $1, * from unnest($2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[]) on conflict do nothing
"""
_FORGET_VERSIONS = f"""
delete from chat_versions v using (
    select chat_id, stamp, client,
        row_number() over (partition by chat_id order by stamp desc, client desc) as n
    from chat_versions where user_id = $1 and chat_id = any($2::text[])) old
where v.user_id = $1 and (v.chat_id, v.stamp, v.client) = (old.chat_id, old.stamp, old.client) and old.n > {_VERSIONS}
"""


@dataclass(slots=True)
class Found:
    """What operations are about, as it is stored: with messages' positions, and when a chat changed last.

    `last` is the last position in a chat.
    """

    state: State = field(default_factory=State)
    positions: dict[str, int] = field(default_factory=dict)
    seqs: dict[str, int] = field(default_factory=dict)
    last: dict[str, int] = field(default_factory=dict)

    def add(self, row: asyncpg.Record) -> None:
        """What a statement with `found` has found. Raises TooLarge where that is too much at once."""
        for given in orjson.loads(row["chats"] or b"[]"):
            self.last[given["name"]] = given["position"]
            if given["id"] is not None:
                self.state.chats[given["id"]] = chat_of(given)
                self.seqs[given["id"]] = given["seq"]
        for given in orjson.loads(row["messages"] or b"[]"):
            if given["content"] is None:
                raise TooLarge(
                    "body_too_large",
                    f"What is stored under the ids of these messages is larger than {_MOST_BYTES >> 20} MiB; "
                    "push fewer mutations at once.",
                )
            self.state.messages[given["id"]] = message_of(given)
            self.positions[given["id"]] = given["position"]


@dataclass(slots=True)
class Marks:
    """What was changed: by id the number of the change and whose word it is."""

    chats: dict[str, tuple[int, str]] = field(default_factory=dict)
    messages: dict[str, tuple[int, str]] = field(default_factory=dict)
    count: int = 0

    def set(self, seq: int, *, origin: str, chats: Iterable[str] = (), messages: Iterable[str] = ()) -> None:
        for of, names in ((self.chats, chats), (self.messages, messages)):
            for name in names:
                of[name] = (seq, origin)
                self.count += 1

    def names(self) -> frozenset[str]:
        return frozenset(self.chats.keys() | self.messages.keys())

    def __len__(self) -> int:
        return self.count


def named(ops: Iterable[Op]) -> tuple[set[str], set[str]]:
    """The chats and the messages that these name."""
    chats: set[str] = set()
    messages: set[str] = set()
    for op in ops:
        if isinstance(op, AddMessage):
            chats.add(op.chat_id)
        (messages if isinstance(op, _MESSAGE_OPS) else chats).add(op.id)
    return chats, messages


def deleted(ops: Iterable[Op]) -> set[str]:
    """The messages that these delete and do nothing else with."""
    ops = list(ops)
    gone = {op.id for op in ops if isinstance(op, DeleteMessage)}
    return gone - {op.id for op in ops if isinstance(op, AddMessage)} if gone else gone


async def load(connection: Connection, user_id: str, ops: Sequence[Op]) -> Found:
    """Everything that merging these may look at. Other users' ids are as unknown as any."""
    found = Found()
    await _find(connection, user_id, found, *named(ops))
    await load_more(connection, user_id, ops, found)
    return found


async def load_more(connection: Connection, user_id: str, ops: Sequence[Op], found: Found) -> None:
    """What they may look at because of what was found of what they name."""
    state = found.state
    if len(ops) == 1 and not state.messages and not any(chat.is_purged for chat in state.chats.values()):
        return
    chats, messages = named(ops)
    sought = set(messages)
    while True:
        chats = {successor(name) for name in chats if name in state.chats and state.chats[name].is_purged}
        # A device may name what is derived from another of its ids: nothing is looked for twice.
        messages = _forks(ops, state) - sought if messages else set()
        if not chats and not messages:
            return
        await _find(connection, user_id, found, chats, messages)
        sought |= messages


def _forks(ops: Sequence[Op], state: State) -> set[str]:
    """Ids that messages may get because their own is taken, also by one that comes with them."""
    added = [op for op in ops if isinstance(op, AddMessage)]
    names = [op.id for op in added]
    twice = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set()
    return {fork(op) for op in added if op.id in twice or op.id in state.messages}


async def _find(connection: Connection, user_id: str, found: Found, chats: set[str], messages: set[str]) -> None:
    row = await connection.fetchrow(_FIND, user_id, list(chats), list(messages))
    assert row is not None
    found.add(row)


def touchable(ops: Sequence[Op], state: State) -> set[str]:
    """Ids of all that these may write, or look at."""
    chats, messages = named(ops)
    names = chats | messages | _forks(ops, state)
    while chats := {successor(name) for name in chats if name in state.chats and state.chats[name].is_purged}:
        names |= chats
    return names


def together(many: Sequence[Marks]) -> Marks:
    """All of them, where none is about what another one is about."""
    if len(many) == 1:
        return many[0]
    found = Marks()
    for marks in many:
        found.chats |= marks.chats
        found.messages |= marks.messages
        found.count += marks.count
    return found


def place(found: Found, marks: Marks) -> None:
    """Give messages their positions, new ones in the order of their stamps."""
    for message in _in_order(found, marks):
        if message.id not in found.positions:
            found.positions[message.id] = found.last[message.chat_id] = found.last[message.chat_id] + 1


def _in_order(found: Found, marks: Marks) -> list[Message]:
    return sorted((found.state.messages[name] for name in marks.messages), key=lambda one: (one.stamp, one.id))


async def write(
    connection: Connection,
    user_id: str,
    found: Found,
    marks: Marks,
    *,
    seq: int,
    clients: bytes,
    brought: str = "",
    dated: bool = False,
) -> None:
    """Write what was marked and has its place, and how far the user's counter and devices are then.

    `brought`: what the index of conversations has to know, in the same statement. With `dated`, new messages came when
    their stamps say, and not now.
    """
    chats = [_written(found.state.chats[name], *mark) for name, mark in marks.chats.items()]
    messages = [
        {**_written(one, *marks.messages[one.id]), "position": found.positions[one.id]}
        for one in _in_order(found, marks)
    ]
    given = (clients.decode(), orjson.dumps(chats).decode(), orjson.dumps(messages).decode(), dated)
    if brought:
        await connection.execute(_BRING, user_id, seq, *given, brought)
    else:
        await connection.execute(_WRITE, user_id, seq, *given)


def _written(one: Chat | Message, seq: int, origin: str) -> dict[str, Any]:
    fields = {name: getattr(one, name) for name in one.__slots__}
    return {**fields, "ms": ms_of(one.stamp), "seq": seq, "origin": origin}


async def keep(connection: Connection, user_id: str, losers: Sequence[Chat]) -> None:
    """Keep what lost against other devices' words, the last so many of each chat."""
    if not losers:
        return
    lines = [
        (chat.id, chat.stamp, chat.client, chat.title, chat.parent_chat_id, chat.branch_from_message_id)
        for chat in losers
    ]
    await connection.execute(_KEEP, user_id, *map(list, zip(*lines, strict=True)))
    await connection.execute(_FORGET_VERSIONS, user_id, sorted({chat.id for chat in losers}))


def chat_of(row: asyncpg.Record | Mapping[str, Any]) -> Chat:
    return Chat(*map(row.__getitem__, _CHAT))


def message_of(row: asyncpg.Record | Mapping[str, Any]) -> Message:
    return Message(*map(row.__getitem__, _MESSAGE))


_MESSAGE_OPS = (AddMessage, DeleteMessage)
_CHAT, _MESSAGE = tuple(CHAT.split(", ")), tuple(MESSAGE.split(", "))
