"""A client that synchronises, as docs/sync.md says it: the reference for others."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from uuid import uuid4

from app.sync.cursor import Cursor
from app.sync.exchange import Answer, Asked, Mutation
from app.sync.merge import (
    AHEAD_MS,
    LEAST,
    AddMessage,
    Chat,
    DeleteMessage,
    Message,
    Op,
    State,
    apply,
    behind,
    ms_of,
    say,
    stamp_at,
)

# Mutations per exchange.
_MOST = 5


@dataclass(slots=True)
class Device:
    """`base` is what the server has told; the view is that with the outbox applied. `skew_ms`: its clock's error.

    `failed`: it wants failed messages, too.
    """

    skew_ms: int = 0
    failed: bool = False
    client: str = field(default_factory=lambda: uuid4().hex)
    base: State = field(default_factory=State)
    outbox: list[Mutation] = field(default_factory=list)
    next_mid: int = 1
    cursor: Cursor | None = None
    clock: str = LEAST

    def stamp(self, now_ms: int) -> str:
        """The next one: a clock that never goes back, behind everything seen."""
        self.clock = max(stamp_at(now_ms + self.skew_ms), behind(self.clock))
        return self.clock

    def say(self, *ops: Op) -> None:
        self.outbox.append(Mutation(self.next_mid, ops))
        self.next_mid += 1

    def view(self) -> State:
        seen = State(dict(self.base.chats), dict(self.base.messages))
        for mutation in self.outbox:
            for op in mutation.ops:
                apply(seen, op, client=self.client)
        return seen

    def ask(self) -> Asked:
        return Asked(self.client, self.cursor, self.outbox[:_MOST], self.failed)

    def take(self, answer: Answer) -> list[Op]:
        """What an exchange has brought; returns what it has acknowledged."""
        if answer.bootstrap:
            self.base = State()
        done = [op for mutation in self.outbox if mutation.mid <= answer.acked for op in mutation.ops]
        self.outbox = [mutation for mutation in self.outbox if mutation.mid > answer.acked]
        told = {chat.id for chat in answer.chats}, {message.id for message in answer.messages}
        for op in done:
            if op.id not in told[isinstance(op, AddMessage | DeleteMessage)]:
                say(self.base, op, client=self.client)
        self._write(answer.chats, answer.messages)
        self.cursor = answer.cursor
        self._set_back(answer.server_time)
        return done

    def _write(self, chats: Sequence[Chat], messages: Sequence[Message]) -> None:
        self.base.chats |= {chat.id: chat for chat in chats}
        self.base.messages |= {message.id: message for message in messages}
        gone = {chat.id for chat in chats if chat.is_purged}
        if gone:
            kept = {name: one for name, one in self.base.messages.items() if one.chat_id not in gone}
            self.base.messages = kept
        stamps = [*(chat.stamp for chat in chats), *(message.stamp for message in messages)]
        self.clock = max(self.clock, *stamps, LEAST)

    def _set_back(self, server_ms: int) -> None:
        """Stamps from too far ahead are not believed, so they are not given any more."""
        if ms_of(self.clock) > server_ms + AHEAD_MS:
            self.clock = stamp_at(server_ms)
            self.skew_ms = 0

    def begin_anew(self) -> None:
        """The server does not know this device any more, or not how far it is."""
        self.client = uuid4().hex
        self.outbox = [replace(mutation, mid=n) for n, mutation in enumerate(self.outbox, start=1)]
        self.next_mid = len(self.outbox) + 1

    def wipe(self) -> None:
        """Everything is lost with its store."""
        self.base, self.outbox, self.cursor, self.clock, self.next_mid = State(), [], None, LEAST, 1
        self.client = uuid4().hex


def shown(state: State) -> dict[str, object]:
    """What a user sees: chats that are there, with their messages."""
    chats = {f"chat {chat.id}": chat for chat in state.chats.values() if not chat.is_deleted}
    messages = {
        f"message {one.id}": one
        for one in state.messages.values()
        if not one.is_deleted and f"chat {one.chat_id}" in chats
    }
    return {**chats, **messages}
