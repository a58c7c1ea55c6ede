"""Chats and messages as a push reads and writes them, all of them at once. app/chats/store.py writes those of runs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import asyncpg

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

_CHATS = f"select {CHAT}, seq from chats where user_id = $1 and id = any($2::text[])"
_MESSAGES = f"select {MESSAGE}, position from messages where user_id = $1 and id = any($2::text[])"
_LAST = """
select c.id, coalesce((select max(position) from messages where user_id = $1 and chat_id = c.id), 0) as position
from unnest($2::text[]) as c(id)
"""
_WRITE_CHATS = """
insert into chats (user_id, id, title, parent_chat_id, branch_from_message_id, stamp, client, is_deleted, is_purged,
    "timestamp", seq, origin)
select $1, c.id, c.title, c.parent, c.branch, c.stamp, c.client, c.deleted, c.purged, to_timestamp(c.ms / 1000.0),
    c.seq, c.origin
from unnest($2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[], $8::bool[], $9::bool[],
    $10::bigint[], $11::bigint[], $12::text[])
    as c(id, title, parent, branch, stamp, client, deleted, purged, ms, seq, origin)
order by c.id
on conflict (user_id, id) do update set title = excluded.title, parent_chat_id = excluded.parent_chat_id,
    branch_from_message_id = excluded.branch_from_message_id, stamp = excluded.stamp, client = excluded.client,
    is_deleted = excluded.is_deleted, seq = excluded.seq, origin = excluded.origin, updated_at = now()
"""
_WRITE_MESSAGES = """
insert into messages (user_id, id, chat_id, role, content, parent_id, attachments, status, stamp, is_deleted, position,
    "timestamp", seq, origin, is_asked)
select $1, m.id, m.chat, m.role, m.content, m.parent, m.attachments, m.status, m.stamp, m.deleted, m.position,
    to_timestamp(m.ms / 1000.0), m.seq, m.origin, false
from unnest($2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[], $8::text[], $9::text[], $10::bool[],
    $11::int[], $12::bigint[], $13::bigint[], $14::text[])
    as m(id, chat, role, content, parent, attachments, status, stamp, deleted, position, ms, seq, origin)
order by m.id
on conflict (user_id, id) do update set role = excluded.role, content = excluded.content,
    parent_id = excluded.parent_id, attachments = excluded.attachments, status = excluded.status,
    stamp = excluded.stamp, is_deleted = excluded.is_deleted, seq = excluded.seq, origin = excluded.origin,
    created_at = case when messages.status = 'failed' and excluded.status <> 'failed' then now()
        else messages.created_at end,
    updated_at = now()
"""
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
    """What operations are about, as it is stored: with messages' positions, and when a chat changed last."""

    state: State = field(default_factory=State)
    positions: dict[str, int] = field(default_factory=dict)
    seqs: dict[str, int] = field(default_factory=dict)


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

    def __len__(self) -> int:
        return self.count


async def load(connection: Connection, user_id: str, ops: Sequence[Op]) -> Found:
    """Everything that merging these may look at. Other users' ids are as unknown as any."""
    found = Found()
    chats = {op.chat_id if isinstance(op, AddMessage) else op.id for op in ops if not isinstance(op, DeleteMessage)}
    messages = {op.id for op in ops if isinstance(op, AddMessage | DeleteMessage)}
    # A device may name what is derived from another of its ids: nothing is looked for twice.
    sought: set[str] = set()
    while chats or messages:
        await _fetch(connection, user_id, found, chats, messages)
        state, sought = found.state, sought | messages
        chats = {successor(name) for name in chats if name in state.chats and state.chats[name].is_purged}
        messages = _forks(ops, state) - sought if messages else set()
    return found


def _forks(ops: Sequence[Op], state: State) -> set[str]:
    """Ids that messages may get because their own is taken, also by one that comes with them."""
    added = [op for op in ops if isinstance(op, AddMessage)]
    names = [op.id for op in added]
    twice = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set()
    return {fork(op) for op in added if op.id in twice or op.id in state.messages}


async def _fetch(connection: Connection, user_id: str, found: Found, chats: set[str], messages: set[str]) -> None:
    if chats:
        for row in await connection.fetch(_CHATS, user_id, sorted(chats)):
            *values, seq = row
            found.state.chats[row["id"]] = Chat(*values)
            found.seqs[row["id"]] = seq
    if messages:
        for row in await connection.fetch(_MESSAGES, user_id, sorted(messages)):
            found.state.messages[row["id"]] = message_of(row)
            found.positions[row["id"]] = row["position"]


async def write(connection: Connection, user_id: str, found: Found, marks: Marks) -> Mapping[str, int]:
    """Write what was marked; the positions of messages, new ones in the order of their stamps."""
    await _write_chats(connection, user_id, found.state, marks)
    if not marks.messages:
        return found.positions
    changed = sorted((found.state.messages[name] for name in marks.messages), key=lambda one: (one.stamp, one.id))
    new = [message for message in changed if message.id not in found.positions]
    if new:
        names = sorted({message.chat_id for message in new})
        last = {row["id"]: row["position"] for row in await connection.fetch(_LAST, user_id, names)}
        for message in new:
            last[message.chat_id] += 1
            found.positions[message.id] = last[message.chat_id]
    await _write_messages(connection, user_id, changed, found.positions, marks)
    return found.positions


async def _write_chats(connection: Connection, user_id: str, state: State, marks: Marks) -> None:
    if not marks.chats:
        return
    lines = [
        (
            *(chat.id, chat.title, chat.parent_chat_id, chat.branch_from_message_id, chat.stamp, chat.client),
            *(chat.is_deleted, chat.is_purged, ms_of(chat.stamp), *marks.chats[chat.id]),
        )
        for chat in (state.chats[name] for name in marks.chats)
    ]
    await connection.execute(_WRITE_CHATS, user_id, *map(list, zip(*lines, strict=True)))


async def _write_messages(
    connection: Connection, user_id: str, messages: Sequence[Message], positions: Mapping[str, int], marks: Marks
) -> None:
    lines = [
        (
            *(one.id, one.chat_id, one.role, one.content, one.parent_id, one.attachments, one.status, one.stamp),
            *(one.is_deleted, positions[one.id], ms_of(one.stamp), *marks.messages[one.id]),
        )
        for one in messages
    ]
    await connection.execute(_WRITE_MESSAGES, user_id, *map(list, zip(*lines, strict=True)))


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


def message_of(row: asyncpg.Record) -> Message:
    return Message(**{name: row[name] for name in _MEMBERS})


_MEMBERS = tuple(MESSAGE.split(", "))
