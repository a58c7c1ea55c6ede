"""OpenAI's chat completions: chunks as server-sent events, and the whole answer as one document."""

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request

from app.demo.dialect import FAILED, Call, Frames, dumped

_ID = "chatcmpl-demo"
_CREATED = 1767225600  # fixed, so that the same request always gives the same bytes
_DONE = b"data: [DONE]\n\n"


class OpenAI:
    path = "/v1/chat/completions"

    def understood(self, body: Any, request: Request) -> Call:
        if not isinstance(body, dict) or not isinstance(model := body.get("model"), str):
            raise ValueError("The body must be an object with a model.")
        messages = _messages(body)
        return Call(model, _question(messages), _length(messages), bool(body.get("stream")), body)

    def frames(self, call: Call, said: Sequence[str]) -> Frames:
        finish = _chunk(call.model, {}, finish_reason="stop")
        head, tail = _chunk(call.model, {"content": "\0"}).split(b'"\\u0000"')
        return Frames(
            opening=[_chunk(call.model, {"role": "assistant", "content": ""})],
            around=(head, tail),
            said=said,
            finish=finish,
            done=_DONE,
            ending=[finish, *_usage_wanted(call, said), _DONE],
            failed=_sse(self.error(FAILED, status=500)),
        )

    def document(self, call: Call, said: Sequence[str]) -> Any:
        message = {"role": "assistant", "content": "".join(said)}
        return {
            **_stem(call.model, "chat.completion"),
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": _usage(call.length, len(said)),
        }

    def error(self, message: str, *, status: int) -> Any:
        kind = "invalid_request_error" if 400 <= status < 500 else "server_error"
        code = "model_not_found" if status == 404 else None
        return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def models(names: Sequence[str]) -> Any:
    listed = [{"id": name, "object": "model", "created": _CREATED, "owned_by": "parley"} for name in names]
    return {"object": "list", "data": listed}


def _chunk(model: str, delta: dict[str, Any], *, finish_reason: str | None = None) -> bytes:
    choices = [{"index": 0, "delta": delta, "finish_reason": finish_reason}]
    return _sse({**_stem(model, "chat.completion.chunk"), "choices": choices})


def _usage_wanted(call: Call, said: Sequence[str]) -> list[bytes]:
    options = call.body.get("stream_options")
    if not isinstance(options, dict) or not options.get("include_usage"):
        return []
    stem = _stem(call.model, "chat.completion.chunk")
    return [_sse({**stem, "choices": [], "usage": _usage(call.length, len(said))})]


def _usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


def _stem(model: str, kind: str) -> dict[str, Any]:
    return {"id": _ID, "object": kind, "created": _CREATED, "model": model}


def _sse(value: Any) -> bytes:
    return b"data: " + dumped(value) + b"\n\n"


def _messages(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    messages = body.get("messages")
    return [message for message in messages if isinstance(message, dict)] if isinstance(messages, list) else []


def _question(messages: Sequence[Mapping[str, Any]]) -> str:
    asked = (_content(message) for message in reversed(messages) if message.get("role") == "user")
    return next(asked, "")


def _content(message: Mapping[str, Any]) -> str:
    """A message's text: a string, or the text parts of a list."""
    content = message.get("content")
    if isinstance(content, list):
        return " ".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def _length(messages: Sequence[Mapping[str, Any]]) -> int:
    return sum(len(_content(message)) // 4 + 1 for message in messages)
