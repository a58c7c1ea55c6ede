"""A chat and its messages, as data."""

from dataclasses import dataclass
from typing import Literal

Role = Literal["user", "assistant", "system"]
MessageStatus = Literal["complete", "partial", "failed"]

_TITLE_LENGTH = 80


@dataclass(frozen=True, slots=True)
class Message:
    role: Role
    content: str


def title_from(text: str) -> str:
    """A first title for a chat: the beginning of its first message, on one line, cut between words."""
    line = " ".join(text.split())
    if len(line) <= _TITLE_LENGTH:
        return line
    cut = line[: _TITLE_LENGTH - 1]
    return (cut.rsplit(" ", 1)[0] if " " in cut[_TITLE_LENGTH // 2 :] else cut) + "…"


def most_recent(messages: list[Message], *, limit: int, max_bytes: int) -> list[Message]:
    """The longest tail of `messages` (oldest first) within both bounds."""
    kept: list[Message] = []
    room = max_bytes
    for message in reversed(messages[-limit:] if limit else []):
        room -= len(message.content.encode())
        if room < 0:
            break
        kept.append(message)
    return kept[::-1]
