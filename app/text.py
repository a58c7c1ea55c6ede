"""Text and JSON from outside, made safe once, where they enter: what PostgreSQL, UTF-8 and SSE cannot carry goes."""

import json
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ValidationError

from app.errors import BadRequest, Invalid

# What a name from outside consists of: no control character, nothing that was replaced.
PRINTABLE = r"^[^\x00-\x1f\x7f\ufffd]+$"

# U+0000 is refused by PostgreSQL, lone surrogates by every encoder.
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")

# Arrays and objects in one another. What is written as JSON again may have 254.
_DEEPEST = 100
# Members of a body, about: each costs some 60 bytes of memory when it is two in the body. Commas in texts count, too.
_MOST_PARTS = 500_000

# Vendors repeat keys in part ("sk-ab***yz"), so the look of a key counts as well as the key itself.
# A word with stars is looked for from its beginning only, so that the time is linear.
_KEYLIKE = re.compile(
    r"(?<!\S)(?=\S*?\*{3})\S*[\w*]|\bBearer\s+\S+|\b(?:sk|pk|key|gsk|xai)[-_][\w*-]{6,}|\bparley_\w{20,}",
    re.IGNORECASE,
)
# Users' tokens (JWT), encrypted values, and tokens of streaming URLs, whose capitals and digits no name of ours has.
_TOKENS = re.compile(
    r"(?<![\w-])eyJ[\w-]{8,}(?:\.[\w-]*){1,2}|\benc:1:[\w:-]{20,}|(?<![\w-])(?=[\w-]*[0-9])(?=[\w-]*[A-Z])[\w-]{56}(?![\w-])",
    re.ASCII,
)
_CREDENTIALS = re.compile(r"(?<=://)[^\s/@:]*:[^\s/@]*@")


def redacted(text: str) -> str:
    """The text without anything that looks like a key, or like credentials in a URL. In linear time."""
    return without_keys(_CREDENTIALS.sub("[credentials]@", text))


def without_keys(text: str) -> str:
    """The text without anything that looks like a key. In linear time."""
    return _TOKENS.sub("[token]", _KEYLIKE.sub("[key]", text))


def clean(text: str) -> str:
    """The text with each U+0000 and each lone surrogate replaced by U+FFFD."""
    return _UNSTORABLE.sub("\ufffd", text)


def stored_size(text: str) -> int:
    """Its bytes once it is clean, without looking at each character: of what is replaced only U+0000 is shorter."""
    return len(text.encode(errors="surrogatepass")) + 2 * text.count("\0")


def parse_object(body: bytes | bytearray) -> dict[str, Any]:
    """A JSON object from a request body. Raises BadRequest for anything else, whatever it holds."""
    if (nested := body.count(b"[") + body.count(b"{")) + body.count(b",") > _MOST_PARTS:
        raise BadRequest("invalid_json", "The body has too many members.")
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        value = _parse_leniently(body)
    if not isinstance(value, dict):
        raise BadRequest("invalid_json", "The body must be a JSON object.")
    if nested > _DEEPEST and _is_deep(value):
        raise BadRequest("invalid_json", f"The body is nested more than {_DEEPEST} deep.")
    return value


def _is_deep(value: Any) -> bool:
    """Without recursion: whoever reads or writes the value later may use some, up to a limit of its own."""
    level = [value]
    for _ in range(_DEEPEST):
        inside = (part for parent in level for part in (parent.values() if isinstance(parent, dict) else parent))
        level = [part for part in inside if isinstance(part, dict | list)]
        if not level:
            return False
    return True


Body = TypeVar("Body", bound=BaseModel)


def validated(model: type[Body], given: Mapping[str, Any]) -> Body:
    """The request body as a model. Raises Invalid naming the first ten fields that are wrong."""
    try:
        return model.model_validate(given)
    except ValidationError as error:
        # Never the input itself: it may be large, secret or both.
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:10])
        raise Invalid("invalid_request", f"The request is not valid: {wrong}.") from None


def _parse_leniently(body: bytes | bytearray) -> Any:
    # orjson refuses lone surrogate escapes, which JavaScript front ends do send (a text cut inside an emoji).
    try:
        return _cleaned(json.loads(body.decode(), parse_constant=_refuse, parse_int=_number))
    except (ValueError, RecursionError):
        raise BadRequest("invalid_json", "The body is not valid JSON in UTF-8, or is nested too deeply.") from None


def _number(digits: str) -> int | float:
    # As orjson reads them: nobody could write a larger integer back.
    number = int(digits)
    return number if -(2**63) <= number < 2**64 else float(digits)


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def _cleaned(value: Any) -> Any:
    match value:
        case str():
            return clean(value)
        case list():
            return [_cleaned(item) for item in value]
        case dict():
            return {clean(key): _cleaned(item) for key, item in value.items()}
        case _:
            return value
