"""What becomes of a change: the one merge rule, which server and devices share. Pure; docs/decisions/0014-sync.md.

tests/vectors/sync/ says the same as data, for clients in other languages.
"""

from dataclasses import dataclass, field, replace
from typing import Literal
from uuid import UUID, uuid5

from app.chats.chat import MessageStatus, Role

# The stamp of what gives way to anybody's word.
LEAST = "000000000000-0000"
# How far a device's clock may be ahead before its stamps are not believed, in milliseconds.
AHEAD_MS = 60_000
# Ids that are derived from others are UUIDs (version 5) in this namespace.
_DERIVED = UUID("6f6b9f4c-2a1d-5c0e-9b3f-7d1e5a4c8b20")

Status = Literal["lost", "forked", "moved"]


@dataclass(frozen=True, slots=True)
class Chat:
    """`stamp` and `client` are of who changed it last. A purged one is deleted, empty, and stays so."""

    id: str
    title: str = ""
    parent_chat_id: str | None = None
    branch_from_message_id: str | None = None
    stamp: str = LEAST
    client: str = ""
    is_deleted: bool = False
    is_purged: bool = False


@dataclass(frozen=True, slots=True)
class Message:
    """`attachments` is a JSON array as text."""

    id: str
    chat_id: str
    role: Role
    content: str
    parent_id: str | None = None
    attachments: str = "[]"
    status: MessageStatus = "complete"
    stamp: str = LEAST
    is_deleted: bool = False


@dataclass(frozen=True, slots=True)
class PutChat:
    """The whole of a chat's own fields: what is left out is none."""

    id: str
    title: str
    stamp: str
    parent_chat_id: str | None = None
    branch_from_message_id: str | None = None


@dataclass(frozen=True, slots=True)
class DeleteChat:
    id: str
    stamp: str


@dataclass(frozen=True, slots=True)
class AddMessage:
    id: str
    chat_id: str
    role: Role
    content: str
    stamp: str
    parent_id: str | None = None
    attachments: str = "[]"
    status: MessageStatus = "complete"


@dataclass(frozen=True, slots=True)
class DeleteMessage:
    id: str


Op = PutChat | DeleteChat | AddMessage | DeleteMessage


@dataclass(frozen=True, slots=True)
class Outcome:
    """`plain`: it is now exactly as the device said. `chats` and `messages` are the ids of what was written."""

    status: Status | None = None
    plain: bool = False
    chats: tuple[str, ...] = ()
    messages: tuple[str, ...] = ()
    # What lost against another word, to be kept.
    loser: Chat | None = None


@dataclass(slots=True)
class State:
    """Chats and messages by id, as far as an exchange is about them. `clock` is the last stamp that was altered."""

    chats: dict[str, Chat] = field(default_factory=dict)
    messages: dict[str, Message] = field(default_factory=dict)
    clock: str = LEAST


def stamp_at(ms: int, count: int = 0) -> str:
    """A stamp of a time in milliseconds since 1970."""
    return f"{ms:012x}-{count:04x}"


def ms_of(stamp: str) -> int:
    return int(stamp[:12], 16)


def behind(stamp: str) -> str:
    """The next stamp after one."""
    ms, count = ms_of(stamp), int(stamp[13:], 16) + 1
    return stamp_at(ms + (count >> 16), count & 0xFFFF)


def successor(chat_id: str) -> str:
    """Where messages for a purged chat go."""
    return str(uuid5(_DERIVED, f"successor\n{chat_id}"))


def fork(op: AddMessage) -> str:
    """The id of a message whose own id somebody else's words have."""
    return str(uuid5(_DERIVED, f"fork\n{op.id}\n{op.role}\n{op.content}\n{op.attachments}"))


def apply(state: State, op: Op, *, client: str, now_ms: int | None = None) -> Outcome:
    """Change the state by one operation of a device.

    With `now_ms` as the server, which does not believe stamps from the future; without, as a device does.
    """
    match op:
        case PutChat():
            return _put(state, op, client, now_ms)
        case DeleteChat():
            return _delete_chat(state, op, client, now_ms)
        case AddMessage():
            return _add(state, op, client, now_ms)
        case DeleteMessage():
            return _delete_message(state, op)


def say(state: State, op: Op, *, client: str) -> None:
    """Write into a device's base what the server has acknowledged without altering anything of it."""
    match op:
        case PutChat():
            state.chats[op.id] = _chat(op, op.stamp, client)
        case DeleteChat():
            state.chats[op.id] = _deleted(state.chats.get(op.id, Chat(op.id)), op.stamp, client)
        case AddMessage():
            state.messages[op.id] = _message(op, op.id, op.chat_id, op.stamp)
        case DeleteMessage():
            _delete_message(state, op)


def _put(state: State, op: PutChat, client: str, now_ms: int | None) -> Outcome:
    have = state.chats.get(op.id)
    if have is not None and have.is_purged:
        return Outcome("lost")
    stamp = _believed(state, op.stamp, now_ms, have)
    put = _chat(op, stamp, client)
    if have is not None and (have.stamp, have.client) >= (stamp, client):
        return Outcome() if (have.stamp, have.client) == (stamp, client) else Outcome("lost", loser=put)
    state.chats[op.id] = put
    loser = have if have is not None and not have.is_deleted and have.title not in ("", put.title) else None
    return Outcome(plain=stamp == op.stamp, chats=(op.id,), loser=loser)


def _chat(op: PutChat, stamp: str, client: str) -> Chat:
    return Chat(op.id, op.title, op.parent_chat_id, op.branch_from_message_id, stamp, client)


def _delete_chat(state: State, op: DeleteChat, client: str, now_ms: int | None) -> Outcome:
    have = state.chats.get(op.id, Chat(op.id))
    if have.is_purged:
        return Outcome()
    stamp = _believed(state, op.stamp, now_ms, have)
    if (have.stamp, have.client) >= (stamp, client):
        return Outcome() if (have.stamp, have.client) == (stamp, client) else Outcome("lost")
    state.chats[op.id] = _deleted(have, stamp, client)
    loser = None if have.is_deleted or not have.title else have
    return Outcome(plain=stamp == op.stamp, chats=(op.id,), loser=loser)


def _deleted(chat: Chat, stamp: str, client: str) -> Chat:
    return replace(chat, is_deleted=True, stamp=stamp, client=client)


def _add(state: State, op: AddMessage, client: str, now_ms: int | None) -> Outcome:
    if (have := state.messages.get(op.id)) is not None:
        return _add_again(state, op, have, client, now_ms)
    stamp = _believed(state, op.stamp, now_ms)
    chat_id, written = _room(state, op.chat_id, stamp, client)
    state.messages[op.id] = _message(op, op.id, chat_id, stamp)
    moved: Status | None = None if chat_id == op.chat_id else "moved"
    return Outcome(moved, plain=not moved and stamp == op.stamp, chats=written, messages=(op.id,))


def _message(op: AddMessage, message_id: str, chat_id: str, stamp: str) -> Message:
    return Message(message_id, chat_id, op.role, op.content, op.parent_id, op.attachments, op.status, stamp)


def _add_again(state: State, op: AddMessage, have: Message, client: str, now_ms: int | None) -> Outcome:
    if have.is_deleted:
        return Outcome()
    if have.status == "failed" and op.status == "complete":
        state.messages[op.id] = _message(op, op.id, have.chat_id, _believed(state, op.stamp, now_ms))
        return Outcome(messages=(op.id,))
    if (have.role, have.content, have.attachments) == (op.role, op.content, op.attachments) or op.status == "failed":
        return Outcome()
    forked = _add(state, replace(op, id=fork(op)), client, now_ms)
    return replace(forked, status="forked", plain=False)


def _room(state: State, chat_id: str, stamp: str, client: str) -> tuple[str, tuple[str, ...]]:
    """The chat that a message goes to, and the chats that were written for it: made, or brought back."""
    while (chat := state.chats.get(chat_id)) is not None and chat.is_purged:
        chat_id = successor(chat_id)
    if chat is None:
        state.chats[chat_id] = Chat(chat_id)
        return chat_id, (chat_id,)
    if not chat.is_deleted or stamp <= chat.stamp:
        return chat_id, ()
    state.chats[chat_id] = replace(chat, is_deleted=False, stamp=stamp, client=client)
    return chat_id, (chat_id,)


def _delete_message(state: State, op: DeleteMessage) -> Outcome:
    have = state.messages.get(op.id)
    if have is None or have.is_deleted:
        return Outcome(plain=True)
    state.messages[op.id] = replace(have, content="", attachments="[]", is_deleted=True)
    return Outcome(plain=True, messages=(op.id,))


def _believed(state: State, stamp: str, now_ms: int | None, have: Chat | None = None) -> str:
    """The stamp, or where it lies too far ahead the server's time, behind what is there and what was altered before."""
    if now_ms is None or ms_of(stamp) <= now_ms + AHEAD_MS:
        return stamp
    state.clock = max(stamp_at(now_ms), behind(state.clock), behind(have.stamp if have else LEAST))
    return state.clock
