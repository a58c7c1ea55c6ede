"""What all shapes of foreign tables have in common: what of a table is read, and how a row becomes a `Said`."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, Protocol

from app.conversations.summary import Role, Said

# What a time column says of its row: when it was written, when the transaction began that wrote it, or when the
# request began that is written at its end.
Meaning = Literal["written", "transaction", "began"]
Reason = Literal[
    "broken_json", "conversation_id_too_long", "no_conversation", "not_a_message", "too_large", "username_too_long"
]

# Characters of a value that are read; a row with a longer one may be skipped. What a batch of rows needs at most
# follows from it.
LONGEST = 256 * 1024


@dataclass(frozen=True, slots=True)
class Skipped:
    """A row that is not indexed, and why."""

    reason: Reason


@dataclass(frozen=True, slots=True)
class Key:
    """The column that names a row. `column` is quoted. Serial: an integer that a sequence gives out.

    `condition` finds rows by their keys, $1, an array of texts.
    """

    column: str
    is_serial: bool
    condition: str = ""


@dataclass(frozen=True, slots=True)
class Time:
    """A time of each row. `column` is quoted; `expression` makes a timestamptz of it, or null."""

    column: str
    expression: str
    means: Meaning
    is_indexed: bool


@dataclass(frozen=True, slots=True)
class Session:
    """The column with the conversation's id. `condition` finds the rows of one: its id is $1, a text.

    `type` is PostgreSQL's: where it is uuid, $1 must be one.
    """

    column: str
    type: str
    condition: str
    is_indexed: bool


@dataclass(frozen=True, slots=True)
class Message:
    """One utterance of a row, whole."""

    role: Role
    text: str
    at: datetime | None = None
    model: str = ""


class Row(Protocol):
    """A record or a tuple with the values that were read, in their order; more may follow."""

    def __getitem__(self, index: int, /) -> Any: ...


class Shape(Protocol):
    """A table of a known kind. `table` is quoted, with its schema.

    `reads` are SQL expressions over the table's columns, each bounded in size; `said` takes a row of their values. The
    first is the key: an integer where it is serial, else a text. `tells` are those that `messages` takes. What is not a
    column of the table but in its JSON has no `time` or `session`.
    """

    @property
    def kind(self) -> str: ...
    @property
    def table(self) -> str: ...
    @property
    def key(self) -> Key: ...
    @property
    def time(self) -> Time | None: ...
    @property
    def session(self) -> Session | None: ...
    @property
    def reads(self) -> Sequence[str]: ...
    @property
    def tells(self) -> Sequence[str]: ...

    def said(self, row: Row) -> Said | Skipped:
        """What a row means to the index. Never raises, whatever is in it."""
        ...

    def messages(self, row: Row) -> Sequence[Message]:
        """What a row says to a reader, in order; nothing where it is not understood. Never raises."""
        ...


# In bytes: the index's own key holds both.
_LONGEST_ID, _LONGEST_USERNAME = 1024, 512


def unnamed(conversation_id: str, username: str) -> Skipped | None:
    """Why a row belongs to no conversation that can be indexed."""
    if not conversation_id:
        return Skipped("no_conversation")
    if _is_longer(conversation_id, _LONGEST_ID):
        return Skipped("conversation_id_too_long")
    return Skipped("username_too_long") if _is_longer(username, _LONGEST_USERNAME) else None


def _is_longer(text: str, most: int) -> bool:
    return len(text) * 4 > most and len(text.encode()) > most
