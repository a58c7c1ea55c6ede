"""A vendor that repeats the key it was sent in every place of an answer that it can, in three dialects."""

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager

# The body of a request names the fault as its model; what is sent instead of an answer, given the key.
Fault = Callable[[str], bytes]

_JSON, _SSE, _HTML = "application/json", "text/event-stream", "text/html"


def _response(status: str, kind: str, body: str, extra: str = "") -> bytes:
    said = body.encode()
    return (
        f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(said)}\r\n{extra}Connection: close\r\n\r\n"
    ).encode() + said


def _told(key: str) -> dict[str, object]:
    """Where vendors put the sentence: as an object, and beside it."""
    said = f"Incorrect key: {key}, sent as Bearer {key} to https://ann:{key}@vendor.invalid/?key={key}"
    return {
        "type": "error",
        "message": said,
        "error": {"type": "api_error", "message": said, "param": key, "code": key},
    }


def _plain(key: str) -> str:
    """A sentence without any word that gives the key away by its looks."""
    return json.dumps({"error": {"message": f"no {key}here"}, "message": f"no {key}here"})


def _refusal(status: str) -> Fault:
    return lambda key: _response(status, _JSON, json.dumps(_told(key)))


def _in_stream(key: str) -> bytes:
    """A beginning, and then the error of each dialect."""
    text = {"choices": [{"delta": {"content": "Well, "}}]}
    openai = f"data: {json.dumps(text)}\n\ndata: {json.dumps(_told(key))}\n\n"
    anthropic = f"event: error\ndata: {json.dumps(_told(key))}\n\n"
    flowise = f"message:\ndata:{json.dumps({'event': 'error', 'data': f'- 401 Bearer {key}'})}\n\n"
    return _response("200 OK", _SSE, openai + anthropic + flowise)


FAULTS: Mapping[str, Fault] = {
    "unauthorized": _refusal("401 Unauthorized"),
    "unavailable": _refusal("503 Service Unavailable"),
    "limited": lambda key: _response("429 Too Many", _JSON, json.dumps(_told(key)), f"Retry-After: {key}\r\n"),
    "plain": lambda key: _response("400 Bad Request", _JSON, _plain(key)),
    "document": lambda key: _response("200 OK", _JSON, json.dumps(_told(key))),
    "stream": _in_stream,
    "garbage": lambda key: _response("200 OK", _SSE, f"data: {{no JSON, {key}}}\n\nevent: {key}\ndata: {key}\n\n"),
    "page": lambda key: _response("502 Bad Gateway", _HTML, f"<title>{key}</title>"),
    "redirect": lambda key: _response("307 See", _HTML, "", f"Location: http://127.0.0.1:9/{key}\r\n"),
    "reason": lambda key: _response(f"401 {key}", _HTML, key),
    "encoding": lambda key: _response("200 OK", _SSE, key, f"Content-Encoding: {key}\r\n"),
    "header": lambda key: f"HTTP/1.1 200 OK\r\n{key} without a colon\r\n\r\n".encode(),
    "nothing": lambda key: f"{key}\r\n\r\n".encode(),
    "length": lambda key: f"HTTP/1.1 200 OK\r\nContent-Length: {key}\r\n\r\n".encode(),
    "chunk": lambda key: f"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{key}\r\n".encode(),
}


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    size = re.search(r"content-length: (\d+)", head, re.IGNORECASE)
    asked = head + (await reader.readexactly(int(size[1])) if size else b"").decode()
    key = re.search(r"(?:authorization: Bearer|x-api-key:) (\S+)", head, re.IGNORECASE)
    fault = next((name for name in FAULTS if f"fault-{name}" in asked), "unauthorized")
    writer.write(FAULTS[fault](key[1] if key else "none"))
    writer.close()


@asynccontextmanager
async def echoing_vendor() -> AsyncGenerator[str, None]:
    """Its root, as a `base_url` without a version."""
    async with await asyncio.start_server(_answer, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
