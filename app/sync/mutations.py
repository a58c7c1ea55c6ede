"""What is done to chats, mutation by mutation, on rows in memory, and then saved at once."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import orjson

from app.access.audit import Actor, note
from app.chats.head import moved
from app.conversations import index, recount
from app.conversations.summary import Said, fold
from app.postgres import Connection
from app.sync import merge, rows
from app.sync.exchange import Asked, Did, Head, Mutation, Pushed
from app.sync.merge import AddMessage, Chat, Message, Op, State
from app.sync.pushes import Push

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# What is not there any more.
_NONE = Message("", "", "user", "", is_deleted=True)
_UNKNOWN = Chat("", is_deleted=True)
ChatOp = merge.PutChat | merge.DeleteChat


@dataclass(slots=True)
class Work:
    """Mutations, one after the other, on rows in memory. `chats` and `messages`: what the device has to be told of."""

    asked: Asked
    head: Head
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

    def gone(self) -> list[str]:
        """Chats that are deleted now and were not."""
        chats, was = self.found.state.chats, self.before.chats
        return sorted(name for name in self.marks.chats if chats[name].is_deleted and _is_there(was.get(name)))

    def did(self, acked: int) -> Did:
        """For figures: what was new in this push."""
        found, before = self.found.state.messages, self.before.messages
        failed = {name for name in self.marks.messages if _is_failed(found[name])}
        mended = {name for name in self.marks.messages if _is_failed(before.get(name))} - failed
        rows_written = len(self.marks.chats) + len(self.marks.messages)
        told = [op["status"] for result in self.results if result["mid"] > acked for op in result["ops"]]
        return Did(
            self.asked.push[-1].mid - acked,
            rows_written,
            Counter(told) if told else {},
            len(failed - before.keys()),
            len(mended),
        )

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

    def told(self) -> Pushed:
        """As it is after all of them. What is not there any more is told as deleted."""
        chats, messages = self.found.state.chats, self.found.state.messages
        return Pushed(
            self.results,
            {name: chats[name] for name in self.chats if name in chats},
            {name: messages.get(name, gone) for name, gone in self.messages.items()},
        )


@dataclass(frozen=True, slots=True)
class Done:
    """A push that was applied; nothing in it is new where all of it was repeated."""

    push: Push
    work: Work
    pushed: Pushed
    is_new: bool


async def save(connection: Connection, user_id: str, works: Sequence[Work], *, dated: bool = False) -> None:
    """What has become of them, one after the other in one transaction, none of which wrote what another one did; how
    far everybody is, and the index of conversations.

    With `dated`, new messages came when their stamps say.
    """
    head, found, before = works[0].head, works[0].found, works[0].before
    marks = rows.together([work.marks for work in works])
    for work in works:
        rows.place(found, work.marks)
    await rows.keep(connection, user_id, [loser for work in works for loser in work.losers])
    said = _said(user_id, before, found.state, places=found.positions, at=None if dated else head.at)
    folded = fold(said, most_keys=0)
    await rows.write(
        connection,
        user_id,
        found,
        marks,
        seq=head.seq,
        clients=orjson.dumps(head.clients),
        brought=index.brought(folded) if folded and not dated else "",
        dated=dated,
    )
    moved(user_id, head.seq)
    if dated:
        await index.merge(connection, index.OWN, folded)
    if chats := _uncounted(before, found.state, said):
        await recount.count_within(connection, [(user_id, chat) for chat in chats])


async def note_gone(connection: Connection, user_id: str, gone: Sequence[str], actor: Actor) -> None:
    """Put on record who has deleted these chats."""
    await note(connection, actor, "chat.delete", target=user_id, detail=f"{len(gone)}: {', '.join(gone)}")


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


_SAYS: Mapping[str, Literal["user", "assistant", "other"]] = {
    "user": "user",
    "assistant": "assistant",
    "system": "other",
}


def _uncounted(before: State, after: State, said: Sequence[Said]) -> list[str]:
    """Chats that have to be counted anew: something has gone or come back."""
    gone = {one.chat_id for name, one in before.messages.items() if _counts(one) and after.messages[name].is_deleted}
    turned = {name for name, chat in after.chats.items() if chat.is_deleted != _is_deleted(before.chats.get(name))}
    # A retry may name another chat than that of the message that failed, of which nothing is known here then.
    hidden = {one.conversation_id for one in said if _is_deleted(after.chats.get(one.conversation_id, _UNKNOWN))}
    return sorted(gone | turned | hidden)


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


def _is_there(chat: Chat | None) -> bool:
    return chat is not None and not chat.is_deleted
