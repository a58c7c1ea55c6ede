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


def estimated_tokens(text: str) -> int:
    """How many tokens a model may make of a text, rather too many than too few: no vendor's tokenizer is asked.

    English takes about four bytes per token and is counted with three; other scripts are counted with two.
    """
    plain = len(text.encode("ascii", "ignore"))
    return plain // 3 + (len(text.encode(errors="replace")) - plain) // 2 + 4


def fitting(messages: list[Message], *, limit: int, budget_tokens: int) -> list[Message]:
    """The longest tail of `messages` within both bounds that does not begin in the middle of an exchange."""
    kept: list[Message] = []
    room = budget_tokens
    for message in reversed(messages[-limit:] if limit else []):
        room -= estimated_tokens(message.content)
        if room < 0:
            break
        kept.append(message)
    while len(kept) < len(messages) and kept and kept[-1].role == "assistant":
        kept.pop()
    return kept[::-1]
