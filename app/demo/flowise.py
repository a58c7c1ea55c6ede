"""Flowise's predictions: a chatflow's events, its answer as one document, and what Flowise refuses.

The wishes are the id of the chatflow, percent-encoded: `/api/v1/prediction/demo%3Ftokens%3D5`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from starlette.requests import Request

from app.demo.dialect import FAILED, Call, Frames, dumped

ABORT = "/api/v1/chatmessage/abort/{flow}/{chat}"
PING = "/api/v1/ping"
STREAMABLE = "/api/v1/chatflows-streaming/{id}"
_MESSAGE_ID = "11111111-1111-4111-8111-111111111111"  # fixed, so that the same request always gives the same bytes
_CHAT_ID = "22222222-2222-4222-8222-222222222222"


class Flowise:
    path = "/api/v1/prediction/{id}"

    def understood(self, body: Any, request: Request) -> Call:
        if not isinstance(body, dict):
            raise ValueError("Error: predictionsController.createPrediction - body not provided!")
        if refused := next(_refusals(body), None):
            raise ValueError(refused)
        told = [body["question"], *(item["content"] for item in body.get("history") or ())]
        length = sum(len(text) // 4 + 1 for text in told)
        streaming = body.get("streaming") in (True, "true")
        return Call(request.path_params["id"], body["question"], length, streaming, body)

    def frames(self, call: Call, said: Sequence[str]) -> Frames:
        head, tail = _event("token", "\0").split(b'"\\u0000"')
        metadata = _event("metadata", _metadata(call))
        end = _bare("end", "[DONE]")
        return Frames(
            opening=[_event("start", said[0] if said else "")],  # which the first token repeats
            around=(head, tail),
            said=said,
            finish=metadata,
            done=end,
            ending=[_event("usageMetadata", _usage(call, said)), metadata, end],
            failed=_bare("error", FAILED),
        )

    def document(self, call: Call, said: Sequence[str]) -> Any:
        return {"text": "".join(said), **_metadata(call)}

    def error(self, message: str, *, status: int) -> Any:
        return {"statusCode": status, "success": False, "message": message, "stack": {}}


def _refusals(body: Mapping[str, Any]) -> Iterator[str]:
    if not isinstance(body.get("question"), str):
        yield "Either question or form is required"
    for item in body.get("history") or ():
        fine = isinstance(item, dict) and item.get("role") in ("apiMessage", "userMessage")
        if not fine or not isinstance(item.get("content"), str):
            yield (
                "Invalid history format. Each history item must have: "
                '{ role: "apiMessage" | "userMessage", content: string }'
            )
    for upload in body.get("uploads") or ():
        if not isinstance(upload, dict) or not {"data", "type", "name", "mime"} <= upload.keys():
            yield "Invalid uploads"


def _metadata(call: Call) -> dict[str, Any]:
    overrides = call.body.get("overrideConfig")
    session = overrides.get("sessionId") if isinstance(overrides, dict) else None
    chat = call.body.get("chatId") or session or _CHAT_ID
    named = {"chatId": chat, "chatMessageId": _MESSAGE_ID, "question": call.question, "sessionId": session or chat}
    return {**named, "memoryType": "Buffer Memory"} if session else named


def _usage(call: Call, said: Sequence[str]) -> dict[str, int]:
    return {"input_tokens": call.length, "output_tokens": len(said), "total_tokens": call.length + len(said)}


def _event(name: str, data: Any) -> bytes:
    return b"message:\ndata:" + dumped({"event": name, "data": data}) + b"\n\n"


def _bare(name: str, data: Any) -> bytes:
    """Flowise writes the first line of some events without its colon; a field is what it is for a reader."""
    return b"message\ndata:" + dumped({"event": name, "data": data}) + b"\n\n"
