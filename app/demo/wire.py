"""The bytes of OpenAI's chat completions: chunks as server-sent events, and the whole answer as one document."""

import json
import time
from collections.abc import Sequence
from typing import Any

ID = "chatcmpl-demo"
CREATED = 1767225600  # fixed, so that the same request always gives the same bytes
DONE = b"data: [DONE]\n\n"
# A token to be replaced by the time at which its frame is sent; as wide as any such time.
STAMP = "0" * 19


def sse(value: Any) -> bytes:
    return b"data: " + dumped(value) + b"\n\n"


def stamped(frames: bytes) -> bytes:
    return frames.replace(STAMP.encode(), b"%019d" % time.monotonic_ns())


def dumped(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


class Frames:
    """The frames of one answer, encoded before the first is sent: a benchmark measures its subject, not the demo."""

    def __init__(self, model: str, tokens: Sequence[str], *, prompt_tokens: int, include_usage: bool) -> None:
        self.model = model
        self.tokens = tokens
        self._head, self._tail = self.chunk({"content": "\0"}).split(b'"\\u0000"')
        self.role = self.chunk({"role": "assistant", "content": ""})
        self.texts = [self.text(dumped(token)) for token in tokens]
        self.finish = self.chunk({}, finish_reason="stop")
        counts = usage(prompt_tokens, len(tokens))
        self.usage = [self._event(choices=[], usage=counts)] if include_usage else []

    def text(self, content: bytes) -> bytes:
        """A frame around an already encoded string."""
        return self._head + content + self._tail

    def chunk(self, delta: dict[str, Any], *, finish_reason: str | None = None) -> bytes:
        return self._event(choices=[{"index": 0, "delta": delta, "finish_reason": finish_reason}])

    def ending(self) -> list[bytes]:
        return [self.finish, *self.usage, DONE]

    def whole(self) -> list[bytes]:
        return [self.role, *self.texts, *self.ending()]

    def _event(self, **members: Any) -> bytes:
        return sse({**_stem(self.model, "chat.completion.chunk"), **members})


def completion(model: str, text: str, *, prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    return {
        **_stem(model, "chat.completion"),
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": usage(prompt_tokens, completion_tokens),
    }


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


def error(message: str, *, kind: str, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def _stem(model: str, kind: str) -> dict[str, Any]:
    return {"id": ID, "object": kind, "created": CREATED, "model": model}
