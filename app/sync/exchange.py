"""What a device says in an exchange, what it is told, and what is known of its user meanwhile."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from app.sync import merge
from app.sync.cursor import Cursor
from app.sync.merge import Chat, Message, Op

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
class Head:
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


@dataclass(slots=True)
class Pushed:
    """What became of a push: what the device has to be told of, beside what others did.

    `acked` is its last mutation then, `seq` the user's counter: what comes behind that is not in its answer. `resync`:
    why it has to begin anew; `until`: of its cursor, where 0 is a bootstrap from nothing.
    """

    results: list[Mapping[str, Any]] = field(default_factory=list)
    chats: dict[str, Chat] = field(default_factory=dict)
    messages: dict[str, Message] = field(default_factory=dict)
    did: Did = field(default_factory=Did)
    acked: int = 0
    seq: int = 0
    resync: Resync | None = None
    until: int = 1
