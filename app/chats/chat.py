"""A chat and its messages, as data."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Role = Literal["user", "assistant", "system"]
MessageStatus = Literal["complete", "partial", "failed"]

# Of a message, whoever brings it, in bytes as they are stored: its text, and its attachments as JSON.
LONGEST, MOST_ATTACHED = 1 << 20, 1 << 20

_TITLE_LENGTH = 80
# What models count for the role of a message and what stands around it.
_MESSAGE_TOKENS = 4


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


def estimated_tokens(text: str) -> int:
    """How many tokens a message with this text may cost, rather too many than too few: no vendor's tokenizer is asked.

    English takes about four bytes per token and is counted with three; other scripts are counted with two, which is 1.5
    tokens for a Chinese character. docs/templates.md compares it with tokenizers of 20 languages.
    """
    plain = len(text.encode("ascii", "ignore"))
    return plain // 3 + (len(text.encode(errors="replace")) - plain) // 2 + _MESSAGE_TOKENS


def fitting(messages: Sequence[Message], *, limit: int, budget_tokens: int) -> list[Message]:
    """The longest tail of `messages` (oldest first) within both bounds that does not begin in mid exchange.

    Whole messages without a gap: the first that does not fit ends it, however short the ones before are. An answer
    whose question is cut off goes with it; a greeting that truly opens the chat stays while everything fits.
    """
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
