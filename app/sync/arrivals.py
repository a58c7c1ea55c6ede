"""Where chats go that come to a user from elsewhere: from a file, or from another user."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from uuid import UUID, uuid5

from app.postgres import Connection
from app.sync.merge import AddMessage, Chat, Op, PutChat, successor
from app.sync.rows import CHAT

# How often a chat may have been purged and come again.
_LIVES = 8
# Ids that others count anew in each conversation become their chat's own by this.
_IDS = UUID("c8d2b2d7-4d3e-5a7c-8f58-6a0a0f7b7f43")

_KNOWN = f"select {CHAT} from chats where user_id = $1 and id = any($2::text[])"
# Each by its key, whatever the planner thinks of how many messages a user has.
_HOMES = """
select m.id, m.chat_id from unnest($2::text[]) as k(id)
cross join lateral (select id, chat_id from messages where user_id = $1 and id = k.id offset 0) m
"""


async def targets(connection: Connection, user_id: str, names: Collection[str]) -> dict[str, tuple[str, Chat | None]]:
    """By each chat's id the one that takes its messages, which is another where it was purged, and what is there."""
    lines = {name: _line(name) for name in names}
    rows = await connection.fetch(_KNOWN, user_id, sorted({one for line in lines.values() for one in line}))
    known = {row["id"]: Chat(*row) for row in rows}
    found = {}
    for name, line in lines.items():
        target = next((one for one in line if one not in known or not known[one].is_purged), name)
        found[name] = (target, known.get(target))
    return found


def _line(name: str) -> Sequence[str]:
    """The chat, and those that come after it where it was purged."""
    names = [name]
    while len(names) < _LIVES:
        names.append(successor(names[-1]))
    return names


def own_id(chat_id: str, message_id: str) -> str:
    """The id of a message whose own id a message of another chat has."""
    return str(uuid5(_IDS, f"{chat_id}\n{message_id}"))


async def apart(connection: Connection, user_id: str, ops: Sequence[Op]) -> Sequence[Op]:
    """The same, but messages under ids of their chat's own where another chat's has theirs: else they would be lost.

    What names such a message, as the one it answers or the one that a chat branches from, names it by that id.
    """
    given = {one for op in ops for one in _named(op)}
    names = {name for _, name in given} | {own_id(*one) for one in given}
    homes = {row["id"]: row["chat_id"] for row in await connection.fetch(_HOMES, user_id, sorted(names))}
    added = [_apart(op, homes) if isinstance(op, AddMessage) else op for op in ops]
    return [_branched(op, homes) if isinstance(op, PutChat) else op for op in added]


def _named(op: Op) -> Iterator[tuple[str, str]]:
    """The messages of an operation, each with the chat that it should be in."""
    match op:
        case AddMessage():
            yield op.chat_id, op.id
            if op.parent_id:
                yield op.chat_id, op.parent_id
        case PutChat(parent_chat_id=str(chat), branch_from_message_id=str(message)):
            yield chat, message


def _apart(op: AddMessage, homes: dict[str, str]) -> AddMessage:
    name, parent = own_id(op.chat_id, op.id), op.parent_id
    # It may have it already, while whatever had its first one has gone since.
    if name not in homes and homes.get(op.id, op.chat_id) == op.chat_id:
        name = op.id
    homes.setdefault(name, op.chat_id)
    return replace(op, id=name, parent_id=_parent(op.chat_id, parent, homes) if parent else parent)


def _parent(chat_id: str, name: str, homes: Mapping[str, str]) -> str:
    own = own_id(chat_id, name)
    return own if own in homes else name


def _branched(op: PutChat, homes: Mapping[str, str]) -> PutChat:
    """The chat it comes from may follow it: then its message will get an id of its own where another chat has this."""
    chat, name = op.parent_chat_id, op.branch_from_message_id
    if not chat or not name:
        return op
    is_taken = homes.get(name, chat) != chat
    return replace(op, branch_from_message_id=own_id(chat, name) if is_taken else _parent(chat, name, homes))
