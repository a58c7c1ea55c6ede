"""Anthropic's Messages: named events in the vendor's order, the whole answer as one document, and what it refuses."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from starlette.requests import Request

from app.demo.dialect import FAILED, Call, Frames, dumped

_ID = "msg_demo"
_CREATED = "2026-01-01T00:00:00Z"
_PING = b'event: ping\ndata: {"type":"ping"}\n\n'
_KINDS: Mapping[int, str] = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}


class Anthropic:
    path = "/v1/messages"

    def understood(self, body: Any, request: Request) -> Call:
        if not isinstance(body, dict) or not isinstance(model := body.get("model"), str):
            raise ValueError("model: Field required")
        if refused := next(_refusals(body, request), None):
            raise ValueError(refused)
        messages = body["messages"]
        spoken = [" ".join(_texts(message["content"])) for message in messages if message["role"] == "user"]
        length = sum(len(text) // 4 + 1 for message in messages for text in _texts(message["content"]))
        return Call(model, spoken[-1], length, bool(body.get("stream")), body)

    def frames(self, call: Call, said: Sequence[str]) -> Frames:
        head, tail = _delta("\0").split(b'"\\u0000"')
        finish = _event(
            "message_delta", delta={"stop_reason": "end_turn", "stop_sequence": None}, usage=_usage(call, len(said))
        )
        done = _event("message_stop")
        return Frames(
            opening=[
                _event("message_start", message=_message(call, content=[], stop_reason=None, usage=_usage(call, 1))),
                _event("content_block_start", index=0, content_block={"type": "text", "text": ""}),
                _PING,
            ],
            around=(head, tail),
            said=said,
            finish=finish,
            done=done,
            ending=[_event("content_block_stop", index=0), finish, done],
            failed=_event("error", **self.error(FAILED, status=500)),
        )

    def document(self, call: Call, said: Sequence[str]) -> Any:
        content = [{"type": "text", "text": "".join(said)}]
        return _message(call, content=content, stop_reason="end_turn", usage=_usage(call, len(said)))

    def error(self, message: str, *, status: int) -> Any:
        kind = _KINDS.get(status, "invalid_request_error" if 400 <= status < 500 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_demo"}


def models(names: Sequence[str]) -> Any:
    listed = [{"type": "model", "id": name, "display_name": name, "created_at": _CREATED} for name in names]
    return {"data": listed, "has_more": False, "first_id": names[0], "last_id": names[-1]}


def _refusals(body: Mapping[str, Any], request: Request) -> Iterator[str]:
    """What the vendor would not accept, in its words."""
    if "anthropic-version" not in request.headers:
        yield "anthropic-version: header is required"
    if type(limit := body.get("max_tokens")) is not int or limit < 1:
        yield "max_tokens: Field required"
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        yield "messages: at least one message is required"
        return
    for place, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ("user", "assistant"):
            yield f'messages.{place}.role: Input should be "user" or "assistant"'
        elif not (texts := list(_texts(message.get("content")))) and not _pictures(message.get("content")):
            yield f"messages.{place}: user messages must have non-empty content"
        elif not all(text.strip() for text in texts):
            yield f"messages.{place}: text content blocks must contain non-whitespace text"
    if messages[0].get("role") != "user":
        yield 'messages: first message must use the "user" role'


def _texts(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, list):
        for block in content:
            if isinstance(block, dict) and block.get("type") == "text":
                yield str(block.get("text", ""))


def _pictures(content: Any) -> bool:
    return isinstance(content, list) and any(
        isinstance(block, dict) and block.get("type") == "image" for block in content
    )


def _message(call: Call, *, content: list[Any], stop_reason: str | None, usage: Mapping[str, int]) -> dict[str, Any]:
    return {
        "id": _ID,
        "type": "message",
        "role": "assistant",
        "model": call.model,
        "content": content,
        "stop_reason": stop_reason,
        "stop_sequence": None,
        "usage": usage,
    }


def _usage(call: Call, output_tokens: int) -> dict[str, int]:
    cached = {"cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}
    return {"input_tokens": call.length, **cached, "output_tokens": output_tokens}


def _delta(text: str) -> bytes:
    return _event("content_block_delta", index=0, delta={"type": "text_delta", "text": text})


def _event(name: str, **members: Any) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (name.encode(), dumped({"type": name, **members}))
