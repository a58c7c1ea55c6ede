"""What a provider's answer says, as proxies store it: OpenAI's, Anthropic's and like forms, streamed or not."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from app.conversations.sources.content import lines, member, name, parsed, read_tokens, text_of, tokens, written_tokens
from app.conversations.sources.shape import Skipped
from app.text import clean

# Where programs put the id of a conversation, the likeliest first.
_IDS = (
    *("conversation_id", "conversationId", "session_id", "sessionId", "chat_id", "chatId", "thread_id", "threadId"),
    *("conversation", "session", "thread"),
)
# Objects in which it may be, beside the outermost.
_INSIDE = ("metadata", "message", "response", "data", "extra", "choices")
_DEEPEST = 3


# Of a stream's parts those that are searched for the id, from the beginning and from the end: any may be long.
_SEARCHED = 20
# Without any of these there is no id, and most texts need no search.
_HINT = re.compile(r"conversation|session|thread|chat_?[iI]d")


@dataclass(frozen=True, slots=True)
class Answer:
    """As far as it is known. `conversation_id` is empty where the answer names none."""

    conversation_id: str = ""
    model: str = ""
    tokens: int = 0
    parts: Sequence[dict[str, Any]] = ()

    @property
    def has_text(self) -> bool:
        return any(_pieces(self.parts))

    @property
    def text(self) -> str:
        return clean("".join(_pieces(self.parts)))


def answer(raw: str | None, *, path: Sequence[str] = ()) -> Answer | Skipped:
    """`path`: where the conversation's id is, if that is known. Why not, for what is no JSON at all."""
    parts = _parts(raw)
    if isinstance(parts, Skipped):
        return parts
    return Answer(
        _named(raw or "", parts, path),
        next((found for part in parts if (found := _model(part))), ""),
        _tokens(parts),
        parts,
    )


def _parts(raw: str | None, *, is_inner: bool = False) -> list[dict[str, Any]] | Skipped:
    """The objects of an answer: one, or those of a stream."""
    value = parsed(raw)
    if isinstance(value, Skipped) and value.reason == "broken_json" and raw is not None:
        value = list(lines(raw)) or value
    if isinstance(value, Skipped):
        return value
    if isinstance(value, str) and not is_inner:
        return _parts(value, is_inner=True)
    found = [part for part in (value if isinstance(value, list) else [value]) if isinstance(part, dict)]
    return found or Skipped("not_a_message")


def _named(raw: str, parts: Sequence[dict[str, Any]], path: Sequence[str]) -> str:
    if not path and not _HINT.search(raw):
        return ""
    likely = parts if len(parts) <= 2 * _SEARCHED else [*parts[:_SEARCHED], *parts[-_SEARCHED:]]
    return next((found for part in likely if (found := _id(part, path))), "")


def _id(part: dict[str, Any], path: Sequence[str]) -> str:
    if path:
        return _as_id(member(part, *path))
    level: list[Any] = [part]
    for _ in range(_DEEPEST):
        for value in level:
            if found := next((found for one in _IDS if (found := _as_id(member(value, one)))), ""):
                return found
        level = [inner for value in level for one in _INSIDE if isinstance(inner := member(value, one), dict)]
    return ""


def _as_id(value: Any) -> str:
    """A text, a number, or an object with an id."""
    if isinstance(value, dict):
        value = value.get("id")
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63:
        return str(value)
    return clean(value) if isinstance(value, str) else ""


def _model(part: dict[str, Any]) -> str:
    return name(part.get("model"), member(part, "message", "model"), member(part, "response", "model"))


def _tokens(parts: Sequence[dict[str, Any]]) -> int:
    """The most that any part says: streams count up, and Anthropic's say input and output apart."""
    usages = [usage for part in parts for usage in _usages(part)]
    total = max(map(tokens, usages), default=0)
    return max(total, max(map(read_tokens, usages), default=0) + max(map(written_tokens, usages), default=0))


def _usages(part: dict[str, Any]) -> Iterator[Any]:
    for usage in (part.get("usage"), member(part, "message", "usage"), member(part, "response", "usage")):
        if usage:
            yield usage
    if part.get("done") is True:  # Ollama's last part is the usage itself
        yield part


def _pieces(parts: Sequence[dict[str, Any]]) -> Iterator[str]:
    for part in parts:
        yield next((text for content in _contents(part) if (text := text_of(content))), "")


def _contents(part: dict[str, Any]) -> Iterator[Any]:
    """Where a part may have its text, of which one has it."""
    choices = part.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    yield from (member(first, "message", "content"), member(first, "delta", "content"), member(first, "text"))
    yield from (part.get("content"), member(part, "message", "content"))
    if part.get("type") in ("content_block_delta", "response.output_text.delta"):
        yield part.get("delta")
    output = part.get("output")
    if isinstance(output, list):
        yield "\n".join(text for item in output if (text := text_of(member(item, "content"))))
    yield from (part.get("response") if isinstance(part.get("response"), str) else None, part.get("answer"))
