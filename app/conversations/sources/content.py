"""What foreign JSON says: texts, roles, tokens and models, wherever the libraries put them. Nothing in here raises."""

import json
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson

from app.conversations.sources.shape import LONGEST, Skipped
from app.conversations.summary import QUESTION, Role
from app.text import clean

# As much of a model's, a chatbot's or a client's name as the index keeps, in characters.
_NAME = 200
# One message's tokens and milliseconds: more is a mistake of whoever wrote it, and sums must fit.
_MOST = 10**9
_FIRST, _LAST = datetime(1970, 1, 1, tzinfo=UTC), datetime(9999, 1, 1, tzinfo=UTC)

_LINE = re.compile(r"[\r\n]+")

_ROLES: Mapping[str, Role] = {
    **dict.fromkeys(("human", "user", "humanmessage", "humanmessagechunk", "usermessage"), "user"),
    **dict.fromkeys(("ai", "assistant", "model", "aimessage", "aimessagechunk", "apimessage"), "assistant"),
}


def parsed(text: str | None) -> Any:
    """The value of a JSON text, or why there is none. Lone surrogates are left in it."""
    if text is None:
        return Skipped("not_a_message")
    if len(text) > LONGEST:
        return Skipped("too_large")
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return _leniently(text)


def _leniently(text: str) -> Any:
    # orjson refuses lone surrogate escapes and huge numbers, which PostgreSQL's json takes.
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return Skipped("broken_json")


def member(value: Any, *path: str) -> Any:
    """What stands at a path of names, or None."""
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def text_of(content: Any) -> str:
    """Content as a string, or as parts of which some are text, storable."""
    return clean(_joined(content))


def _joined(content: Any) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        return ""
    return "\n".join(text for part in content if (text := _part(part)))


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if member(part, "type") in ("text", "input_text", "output_text", "text_delta", None):
        text = member(part, "text")
        return text if isinstance(text, str) else ""
    return ""


def role_of(name: Any) -> Role:
    return _ROLES.get(name.lower(), "other") if isinstance(name, str) else "other"


def question(content: Any) -> str:
    """As `text_of`, as much of it as the index shows."""
    return clean(_joined(content)[:QUESTION])


def name(*candidates: Any) -> str:
    """The first that is a text with something in it, cut and storable."""
    for one in candidates:
        if isinstance(one, str) and one:
            return clean(one[:_NAME])
    return ""


def whole(value: Any) -> int:
    """A count, within bounds; 0 for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return 0
    return int(min(value, _MOST)) if value > 0 else 0


def tokens(usage: Any) -> int:
    """The total of a usage, in any of the libraries' words."""
    if not usage:  # in ten million messages that say none
        return 0
    for total in ("total_tokens", "totalTokens"):
        if found := whole(member(usage, total)):
            return found
    return read_tokens(usage) + written_tokens(usage)


def read_tokens(usage: Any) -> int:
    return _first_count(usage, "input_tokens", "prompt_tokens", "promptTokens", "prompt_eval_count")


def written_tokens(usage: Any) -> int:
    return _first_count(usage, "output_tokens", "completion_tokens", "completionTokens", "eval_count")


def _first_count(usage: Any, *names: str) -> int:
    return next((found for one in names if (found := whole(member(usage, one)))), 0)


def moment(value: Any) -> datetime | None:
    """A time, from whatever a column holds: a timestamp, seconds or milliseconds since 1970, or ISO 8601.

    Without a time zone it is UTC. None outside of the years 1970 to 9998.
    """
    if value is None:
        return None
    found: datetime | None = None
    if isinstance(value, datetime):
        found = value
    elif isinstance(value, int) and not isinstance(value, bool):
        found = _since_1970(value)
    elif isinstance(value, str):
        found = _iso(value.strip())
    if found is None:
        return None
    if found.tzinfo is None:
        found = found.replace(tzinfo=UTC)
    try:
        found = found.astimezone(UTC)
    except OverflowError:
        return None
    return found if _FIRST <= found < _LAST else None


def _since_1970(number: int) -> datetime | None:
    # 10^11 seconds are the year 5138, 10^11 milliseconds 1973.
    seconds = number / 1000 if abs(number) >= 10**11 else number
    return _FIRST + timedelta(seconds=seconds) if 0 <= seconds < 2.5e11 else None


def _iso(text: str) -> datetime | None:
    if text.isdigit() and text.isascii() and len(text) <= 18:
        return _since_1970(int(text))
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return None


def micros(at: datetime | None) -> int:
    """A rank, where a source numbers its messages by nothing else."""
    return (at - _FIRST) // timedelta(microseconds=1) if at else 0


def rank(key: int | str, at: datetime | None) -> int:
    """What orders a source's messages: its numbers, or else its times."""
    if isinstance(key, int):
        return key
    return int(key) if key.isdecimal() and len(key) <= 18 else micros(at)


def lines(raw: str) -> Iterator[Any]:
    """The JSON values in a text of several: server-sent events, or one value on each line."""
    # Not splitlines(): JSON may hold U+2028 and the like as they are.
    for line in _LINE.split(raw):
        value = line.strip().removeprefix("data:").strip()
        if value.startswith("{") and not isinstance(found := parsed(value), Skipped):
            yield found
