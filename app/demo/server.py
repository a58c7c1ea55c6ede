"""The demo provider's HTTP side: chat completions, the list of models, and what was asked of it."""

import asyncio
import json
import socket
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from app.demo import faults, wire
from app.demo.answers import tokens
from app.demo.exchange import EXTENSION, Exchange, Protocol, Record, shown_headers
from app.demo.wire import Frames
from app.demo.wishes import Unknown, Wishes, wished

_MODELS = ("demo", "demo?delay_ms=0", "demo?tokens=500&delay_ms=20")
_REMEMBERED = 1000
_REMEMBERED_BODY = 64 * 1024
_WAIT_S = 10
_BACKLOG = 2048


class DemoProvider:
    """One demo provider's memory and endpoints."""

    def __init__(self) -> None:
        self._records: deque[Record] = deque(maxlen=_REMEMBERED)
        self.app = Starlette(
            routes=[
                Route("/v1/chat/completions", self.completions, methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/demo/requests", self.requests),
            ]
        )

    async def models(self, request: Request) -> Response:
        listed = [{"id": name, "object": "model", "created": wire.CREATED, "owned_by": "parley"} for name in _MODELS]
        return JSONResponse({"object": "list", "data": listed})

    async def requests(self, request: Request) -> Response:
        """What was asked, newest last; `key` picks requests, `wait` waits up to 10 s until they are over."""
        key = request.query_params.get("key")
        picked = [record for record in self._records if key is None or record.key == key]
        if "wait" in request.query_params:
            async with asyncio.timeout(_WAIT_S):
                for record in picked:
                    await record.over.wait()
        return JSONResponse({"requests": [record.shown() for record in picked]})

    async def completions(self, request: Request) -> Response:
        try:
            body = json.loads(raw := await request.body())
            wishes = self._patient(_wishes(body, request.headers.get("x-demo", "")))
        except ClientDisconnect:
            return Response(status_code=400)  # nobody will read it
        except (ValueError, RecursionError) as error:
            return JSONResponse(wire.error(str(error), kind="invalid_request_error"), 400)
        if wishes is None:
            missing = f"The model '{body['model']}' does not exist; the demo's are called demo."
            return JSONResponse(wire.error(missing, kind="invalid_request_error", code="model_not_found"), 404)
        kept = body if len(raw) <= _REMEMBERED_BODY else {"bytes": len(raw)}
        record = Record(wishes.key, _address(request), shown_headers(request.headers), kept)
        self._records.append(record)
        return _Answer(wishes, record, body=body)

    def _patient(self, wishes: Wishes | None) -> Wishes | None:
        """The wishes, without their faults when enough requests of this key had them."""
        if wishes is None or wishes.times is None:
            return wishes
        before = sum(record.key == wishes.key for record in self._records)
        return wishes if before < wishes.times else replace(wishes, fault=())


class _Answer(Response):
    """Answers one request as its wishes say, straight over ASGI."""

    def __init__(self, wishes: Wishes, record: Record, *, body: dict[str, Any]) -> None:
        super().__init__()
        self._wishes = wishes
        self._record = record
        self._body = body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        connection = scope["extensions"][EXTENSION]
        credentials = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
        exchange = Exchange(self._wishes, self._record, connection=connection, send=send, credentials=credentials)
        try:
            await self._play(exchange)
        finally:
            exchange.close_record()

    async def _play(self, exchange: Exchange) -> None:
        wishes = self._wishes
        if instead := next((play for name, play in faults.INSTEAD.items() if name in wishes.fault), None):
            await instead(exchange)
            return
        said = self._said()
        if self._body.get("stream"):
            await self._stream(exchange, said)
        else:
            await exchange.pause((wishes.first_ms or 0) / 1000)
            await exchange.start(200, ((b"content-type", b"application/json"),))
            await exchange.end(wire.dumped(self._document(said)))

    def _said(self) -> list[str]:
        wishes = self._wishes
        if wishes.echo:
            return [json.dumps(self._body, ensure_ascii=False)]
        if wishes.clock:
            return [wire.STAMP] * (wishes.tokens or 1)
        return tokens(_question(self._body), wishes.tokens)

    async def _stream(self, exchange: Exchange, said: list[str]) -> None:
        wishes = self._wishes
        options = self._body.get("stream_options")
        include_usage = isinstance(options, dict) and bool(options.get("include_usage"))
        frames = Frames(self._body["model"], said, prompt_tokens=_length(self._body), include_usage=include_usage)
        ending = next((end for name, end in faults.ENDS.items() if name in wishes.fault), None)
        await exchange.start()
        if ending is None:
            await exchange.pace(faults.shaped(wishes.fault, frames, after=wishes.after))
            await exchange.end()
        else:
            await exchange.pace(faults.shaped(("eof", *wishes.fault), frames, after=wishes.after))
            await ending(exchange)

    def _document(self, said: list[str]) -> dict[str, Any]:
        counts = {"prompt_tokens": _length(self._body), "completion_tokens": len(said)}
        return wire.completion(self._body["model"], "".join(said), **counts)


@asynccontextmanager
async def demo_provider(*, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[str]:
    """Serve a demo provider while the block runs; yields its base URL, `http://HOST:PORT/v1`.

    It lives in the running loop beside any other server, leaves signal handlers and logging alone, and ends by
    closing every connection at once.
    """
    listener = _listener(host, port)
    server = _Server(DemoProvider().app)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        shown = f"[{host}]" if ":" in host else host
        yield f"http://{shown}:{listener.getsockname()[1]}/v1"
    finally:
        server.stop()
        await serving


def _listener(host: str, port: int) -> socket.socket:
    # The protocol is named because asyncio turns Nagle's delays (40 ms per token) off only where it is.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError:
        listener.close()
        raise
    listener.listen(_BACKLOG)
    return listener


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, and stopped by an event instead of a flag that is looked at."""

    def __init__(self, app: Starlette) -> None:
        config = uvicorn.Config(
            app, http=Protocol, ws="none", lifespan="off", log_config=None, access_log=False, proxy_headers=False,
            date_header=False, server_header=False, timeout_graceful_shutdown=5,
        )  # fmt: skip
        super().__init__(config)
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        self._stopping.set()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def main_loop(self) -> None:
        await self._stopping.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        await super().shutdown(sockets)


def _wishes(body: Any, header: str) -> Wishes | None:
    """The wishes of a request; None for a model of somebody else. Raises ValueError for what cannot be granted."""
    model = body.get("model") if isinstance(body, dict) else None
    if not isinstance(model, str):
        raise ValueError("The body must be an object with a model.")
    if model.partition("?")[0] != "demo":
        return None
    wishes = wished(model, header)
    if unknown := [name for name in wishes.fault if name not in faults.NAMES]:
        raise Unknown(f"The demo has no fault '{unknown[0]}'. It has {', '.join(faults.NAMES)}.")
    return wishes


def _address(request: Request) -> str:
    return f"{request.client.host}:{request.client.port}" if request.client else ""


def _messages(body: dict[str, Any]) -> list[dict[str, Any]]:
    messages = body.get("messages")
    return [message for message in messages if isinstance(message, dict)] if isinstance(messages, list) else []


def _question(body: dict[str, Any]) -> str:
    asked = (_content(message) for message in reversed(_messages(body)) if message.get("role") == "user")
    return next(asked, "")


def _content(message: dict[str, Any]) -> str:
    """A message's text: a string, or the text parts of a list."""
    content = message.get("content")
    if isinstance(content, list):
        return " ".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def _length(body: dict[str, Any]) -> int:
    return sum(len(_content(message)) // 4 + 1 for message in _messages(body))
