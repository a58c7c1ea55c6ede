"""The demo provider's HTTP side: answers in every dialect, what goes with them, and what was asked of it."""

import asyncio
import json
import socket
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from app.demo import anthropic, faults, flowise, openai
from app.demo.answers import cut, tokens
from app.demo.dialect import STAMP, Call, Dialect, dumped
from app.demo.exchange import Exchange, Protocol, Record, shown_headers
from app.demo.wishes import Unknown, Wishes, wished

# A new vendor is one module and one entry here.
DIALECTS: tuple[Dialect, ...] = (openai.OpenAI(), anthropic.Anthropic(), flowise.Flowise())
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
                *(Route(dialect.path, partial(self.answer, dialect), methods=["POST"]) for dialect in DIALECTS),
                Route("/v1/models", self.models),
                Route(flowise.PING, self.ping),
                Route(flowise.STREAMABLE, self.streamable),
                Route(flowise.ABORT, self.abort, methods=["PUT"]),
                Route("/demo/requests", self.requests),
            ]
        )

    async def models(self, request: Request) -> Response:
        speaker = anthropic if "anthropic-version" in request.headers else openai
        return JSONResponse(speaker.models(_MODELS))

    async def ping(self, request: Request) -> Response:
        return PlainTextResponse("pong")

    async def streamable(self, request: Request) -> Response:
        """Flowise's client asks this before each question."""
        wishes = _wishes_of(request.path_params["id"])
        return JSONResponse({"isStreaming": wishes is not None and not wishes.whole})

    async def abort(self, request: Request) -> Response:
        """Flowise's request to stop. It is only recorded, under `abort:` and the key of what it would stop."""
        wishes = _wishes_of(request.path_params["flow"])
        key = f"abort:{wishes.key if wishes else ''}"
        body = {"chatId": request.path_params["chat"]}
        record = Record(key, _address(request), shown_headers(request.headers), body, ended_at=time.time())
        record.over.set()
        self._records.append(record)
        return JSONResponse({"status": 200, "message": "Chat message aborted"})

    async def requests(self, request: Request) -> Response:
        """What was asked, newest last; `key` picks requests, `wait` waits up to 10 s until they are over."""
        key = request.query_params.get("key")
        picked = [record for record in self._records if key is None or record.key == key]
        if "wait" in request.query_params:
            async with asyncio.timeout(_WAIT_S):
                for record in picked:
                    await record.over.wait()
        return JSONResponse({"requests": [record.shown() for record in picked]})

    async def answer(self, dialect: Dialect, request: Request) -> Response:
        try:
            raw = await request.body()
            call = dialect.understood(json.loads(raw), request)
            wishes = self._patient(_wishes(call.model, request.headers.get("x-demo", "")))
        except ClientDisconnect:
            return Response(status_code=400)  # nobody will read it
        except (ValueError, RecursionError) as error:
            return JSONResponse(dialect.error(str(error), status=400), 400)
        if wishes is None:
            missing = f"The model '{call.model}' does not exist; the demo's are called demo."
            return JSONResponse(dialect.error(missing, status=404), 404)
        kept = call.body if len(raw) <= _REMEMBERED_BODY else {"bytes": len(raw)}
        record = Record(wishes.key, _address(request), shown_headers(request.headers), kept)
        self._records.append(record)
        return _Answer(dialect, call, wishes=wishes, record=record)

    def _patient(self, wishes: Wishes | None) -> Wishes | None:
        """The wishes, without their faults when enough requests of this key had them."""
        if wishes is None or wishes.times is None:
            return wishes
        before = sum(record.key == wishes.key for record in self._records)
        return wishes if before < wishes.times else replace(wishes, fault=())


class _Answer(Response):
    """Answers one request as its wishes say, straight over ASGI."""

    def __init__(self, dialect: Dialect, call: Call, *, wishes: Wishes, record: Record) -> None:
        super().__init__()
        self._dialect = dialect
        self._call = call
        self._wishes = wishes
        self._record = record

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(self._wishes, self._record, dialect=self._dialect, scope=scope, send=send)
        try:
            await self._play(exchange)
        finally:
            exchange.close_record()

    async def _play(self, exchange: Exchange) -> None:
        wishes = self._wishes
        if instead := next((play for name, play in faults.INSTEAD.items() if name in wishes.fault), None):
            await instead(exchange)
        elif self._call.streaming and not wishes.whole:
            await self._stream(exchange)
        else:
            await exchange.pause((wishes.first_ms or 0) / 1000)
            await exchange.start(200, ((b"content-type", b"application/json"),))
            await exchange.end(dumped(self._dialect.document(self._call, self._said())))

    def _said(self) -> list[str]:
        wishes = self._wishes
        if wishes.echo:
            return [json.dumps(self._call.body, ensure_ascii=False)]
        if wishes.clock:
            return [STAMP] * (wishes.tokens or 1)
        if wishes.say is not None:
            return cut(wishes.say)
        return tokens(self._call.question, wishes.tokens)

    async def _stream(self, exchange: Exchange) -> None:
        wishes = self._wishes
        frames = self._dialect.frames(self._call, self._said())
        ending = next((end for name, end in faults.ENDS.items() if name in wishes.fault), None)
        await exchange.start()
        if ending is None:
            await exchange.pace(faults.shaped(wishes.fault, frames, after=wishes.after))
            await exchange.end()
        else:
            await exchange.pace(faults.shaped(("eof", *wishes.fault), frames, after=wishes.after))
            await ending(exchange)


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


def _wishes(model: str, header: str) -> Wishes | None:
    """The wishes of a request; None for a model of somebody else. Raises ValueError for what cannot be granted."""
    if model.partition("?")[0] != "demo":
        return None
    wishes = wished(model, header)
    if unknown := [name for name in wishes.fault if name not in faults.NAMES]:
        raise Unknown(f"The demo has no fault '{unknown[0]}'. It has {', '.join(faults.NAMES)}.")
    return wishes


def _wishes_of(model: str) -> Wishes | None:
    """The wishes of a model that is asked nothing; None for those that cannot be granted either."""
    try:
        return _wishes(model, "")
    except ValueError:
        return None


def _address(request: Request) -> str:
    return f"{request.client.host}:{request.client.port}" if request.client else ""
