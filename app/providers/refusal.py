"""What a provider's error answer means: its kind, whether to try again and when, and a message fit for strangers."""

import asyncio
import math
import re
import time
from collections.abc import Mapping
from contextlib import aclosing
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2
import orjson

from app.providers.provider import ErrorKind, ProviderError
from app.text import without_keys

_BODY_CAP = 64 * 1024
_BODY_WAIT_S = 5
_MESSAGE_CAP = 200
# What is looked at of a sentence, in characters.
_SAID_CAP = 8 * 1024
_LONGEST_WAIT_S = 24 * 3600.0

# A scheme is short, so that the time is linear.
_URL = re.compile(r"[a-z][a-z0-9+.-]{0,20}://\S+", re.IGNORECASE)
# The types of errors that vendors tell inside a stream, where no status can be (Anthropic's names; OpenAI shares some).
_STATUSES: Mapping[str, int] = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "api_error": 500,
    "timeout_error": 504,
    "overloaded_error": 529,
}


class Refusals:
    """Turns one provider's error answers into ProviderError; nothing of `secret` ever gets through."""

    def __init__(self, name: str, *, secret: str | None) -> None:
        self._name = name
        self._secret = secret

    async def of(self, response: httpx2.Response, *, streaming: bool) -> ProviderError | None:
        """Why this response is not the answer that was asked for, or None when it is. May read up to 64 KiB of it."""
        status = response.status_code
        encoding = response.headers.get("content-encoding", "identity").strip().lower()
        if 300 <= status < 400:
            return self._protocol(f"answered with a redirect (status {status}), which is never followed")
        if encoding not in ("identity", ""):
            return self._protocol(f"compressed its answer (status {status}) although it was asked not to")
        if status >= 400:
            message = _message(await beginning(response))
            return self._classified(status, message, retry_after(response.headers.get("retry-after")))
        if not 200 <= status < 300:
            return self._protocol(f"answered with status {status}")
        return await self._of_type(response) if streaming else None

    async def _of_type(self, response: httpx2.Response) -> ProviderError | None:
        media_type = response.headers.get("content-type", "").lower()
        if "json" not in media_type and "html" not in media_type:
            return None  # some servers stream as text/plain, or name no type
        body = _parsed(await beginning(response))
        if isinstance(body, dict) and body.get("error"):
            return self.told(body["error"])
        return self._protocol("answered with a document instead of a stream")

    def told(self, error: Any) -> ProviderError:
        """The failure that an `error` object, inside a stream or in place of one, speaks of."""
        return self._classified(_status(error), _said(error), None)

    def _classified(self, status: int | None, message: str, wait: float | None) -> ProviderError:
        kind, retryable = _kind(status)
        said = f": {clean}" if (clean := self.scrubbed(message)) else ""
        where = f" (status {status})" if status else ""
        verb = "refused the request" if 400 <= (status or 500) < 500 else "reported an error"
        detail = f"Provider '{self._name}' {verb}{where}{said}"
        return ProviderError(kind, detail, retryable=retryable, retry_after=wait)

    def _protocol(self, what: str) -> ProviderError:
        return ProviderError("protocol", f"Provider '{self._name}' {what}.", retryable=False)

    def scrubbed(self, message: str) -> str:
        """One printable line of at most 200 characters without URLs, this key, or anything that looks like a key."""
        message = message[:_SAID_CAP]
        if self._secret:
            message = message.replace(self._secret, "[key]")
        message = without_keys(_URL.sub("[url]", message))
        line = " ".join("".join(c if c.isprintable() else " " for c in message).split())
        return line if len(line) <= _MESSAGE_CAP else f"{line[: _MESSAGE_CAP - 1]}…"


def retry_after(header: str | None, *, now: float | None = None) -> float | None:
    """Seconds from a Retry-After header: a number or an HTTP date (RFC 9110, 10.2.3); None when there is none."""
    if not header:
        return None
    try:
        seconds = float(header)
    except ValueError:
        seconds = _seconds_until(header, time.time() if now is None else now)
    return min(max(seconds, 0), _LONGEST_WAIT_S) if math.isfinite(seconds) else None


def _seconds_until(date: str, now: float) -> float:
    try:
        return parsedate_to_datetime(date).timestamp() - now
    except (ValueError, OverflowError):
        return math.nan


def _status(error: Any) -> int | None:
    """The status that an `error` object stands for: its code where that is one, else what its type means."""
    if not isinstance(error, dict):
        return None
    if isinstance(code := error.get("code"), int) and 400 <= code < 600:
        return code
    return _STATUSES.get(kind) if isinstance(kind := error.get("type"), str) else None


def _kind(status: int | None) -> tuple[ErrorKind, bool]:
    match status:
        case 429:
            return "rate_limited", True
        case 401 | 402 | 403:
            return "refused", False
        case 408:
            return "timeout", True
        case int() if 400 <= status < 500:
            return "rejected", False
        case _:  # 5xx, 529 (overloaded), and errors that name no status
            return "unavailable", True


async def beginning(response: httpx2.Response) -> bytes:
    """At most 64 KiB of a body, or what came of it within 5 s."""
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_WAIT_S), aclosing(response.aiter_raw()) as reads:
            async for data in reads:
                body += data
                if len(body) >= _BODY_CAP:
                    break
    except (httpx2.TransportError, TimeoutError):
        pass  # the status alone has to do
    return bytes(body[:_BODY_CAP])


def _parsed(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return None


def _message(body: bytes) -> str:
    parsed = _parsed(body)
    if not isinstance(parsed, dict):
        return ""  # HTML pages and the like say nothing to a reader of ours
    return _said(parsed.get("error") or parsed)


def _said(error: Any) -> str:
    """The sentence in an error of any vendor's shape."""
    if isinstance(error, str):
        return error
    if isinstance(error, dict):
        said = (error.get(key) for key in ("message", "detail", "error", "type"))
        return next((text for text in said if isinstance(text, str) and text), "")
    return ""
