"""What a file tells of a conversation, whichever program wrote it. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from math import isfinite
from typing import Any, Literal
from uuid import UUID, uuid5

from app.chats.chat import LONGEST, MOST_ATTACHED, MessageStatus
from app.text import stored_size

# Ids that cannot be kept are derived from these: the same file gives the same ids.
_IMPORTED = UUID("a4c1c1f5-9f0d-5b53-9d0e-3f1d8d6b7c11")
_TITLE = 500
# Of another program's id of a conversation, in characters: the id of each of its messages is derived from all of it.
_LONGEST_NAME = 256
# Milliseconds that a time may have: to the end of the year 9999.
_LAST_MS = 253_402_300_799_999

Speaker = Literal["user", "assistant"]


class Unreadable(ValueError):
    """A conversation is not what its program writes; says where."""


@dataclass(frozen=True, slots=True)
class Said:
    """A message; `ms` is when, in milliseconds since 1970, where the file says it. `attachments` are JSON.

    Raises Unreadable where it is larger than any may be.
    """

    id: str
    role: Speaker
    content: str
    ms: int | None = None
    parent_id: str | None = None
    status: MessageStatus = "complete"
    attachments: str = "[]"

    def __post_init__(self) -> None:
        if stored_size(self.content) > LONGEST or stored_size(self.attachments) > MOST_ATTACHED:
            raise Unreadable(f"message {self.id} is larger than {LONGEST >> 20} MiB")


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in their order. `left_out` are those that are no part of it: other branches, instructions, tools."""

    origin: str
    id: str
    title: str
    ms: int | None = None
    messages: Sequence[Said] = field(default_factory=tuple)
    parent_chat_id: str | None = None
    branch_from_message_id: str | None = None
    left_out: int = 0


def derived(*names: str) -> str:
    return str(uuid5(_IMPORTED, "\n".join(names)))


def name_of(*names: Any) -> str:
    """The first of these that says something, as another program's id. Raises Unreadable."""
    name = next((one for one in names if one), "")
    if not isinstance(name, str | int | float) or len(str(name)) > _LONGEST_NAME:
        raise Unreadable(f"its id is no text of at most {_LONGEST_NAME} characters")
    return str(name)


def member(given: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    """A member that has to be there. Raises Unreadable."""
    value = given.get(name)
    if not isinstance(value, kind):
        raise Unreadable(f"{where}{name} is not there or of the wrong kind")
    return value


def text_of(value: Any) -> str:
    return value if isinstance(value, str) else ""


def title_of(value: Any) -> str:
    return text_of(value)[:_TITLE]


def ms_of_seconds(value: Any) -> int | None:
    """Seconds since 1970, or milliseconds where so many seconds would be in a far future."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not isfinite(value) or value <= 0:
        return None
    ms = round(value if value > 1e11 else value * 1000)
    return ms if ms <= _LAST_MS else None


def ms_of_text(value: Any) -> int | None:
    """A time as in ISO 8601; without a zone it is UTC."""
    try:
        moment = datetime.fromisoformat(text_of(value))
        ms = round((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)
    except (ValueError, OverflowError, OSError):
        return None
    return ms if 0 < ms <= _LAST_MS else None
