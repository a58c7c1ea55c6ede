"""One HTTP server around an app: our own signals, so that readers are served until answers have ended."""

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import asynccontextmanager
from functools import partial

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from app import connection
from app.access.origins import cors
from app.errors import Misconfigured, ParleyError
from app.gateway.presence import Life
from app.main import create_app
from app.settings import Settings

# What is left after draining: responses that end by themselves within this time.
_CLOSE_S = 1
_BACKLOG = 2048
_UNACKNOWLEDGED_S = 20.0
# What we answer is read by programs and by pages of ours: it is no script, frame or picture of somebody else's page.
_SAFE = (
    ("X-Content-Type-Options", "nosniff"),
    ("Content-Security-Policy", "frame-ancestors 'none'"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Referrer-Policy", "no-referrer"),
)


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        # uvicorn would close its listeners at once on SIGTERM; whoever runs us decides when to leave.
        yield

    async def on_tick(self, counter: int) -> bool:
        # uvicorn would go on listening for an app whose lifespan has crashed: alive for ever, never ready again.
        return await super().on_tick(counter) or self.lifespan.error_occurred

    async def serve_until_told(self, listener: socket.socket) -> None:
        await self.serve(sockets=[listener])
        if self.lifespan.error_occurred:
            raise ParleyError("crashed", "The server ended because something inside it failed; the log says what.")


def bind(host: str, port: int, *, unacknowledged_s: float = _UNACKNOWLEDGED_S) -> socket.socket:
    """A listening socket. Raises Misconfigured with what to do where the port is taken.

    On Linux its connections end when what they were sent stays unacknowledged for so long: a client that vanished
    without a word would otherwise be kept for as long as the kernel repeats itself, a quarter of an hour.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named because asyncio turns Nagle's delay off only where it is.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if sys.platform == "linux":
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(unacknowledged_s * 1000))
    try:
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise Misconfigured(
            "port_taken", f"Cannot listen on {host}:{port} ({error.strerror}); set PARLEY_PORT or PARLEY_HOST."
        ) from None
    return listener


def signals() -> asyncio.Event:
    """An event set by the first SIGINT or SIGTERM; a second one kills the process the default way."""
    loop = asyncio.get_running_loop()
    leave = asyncio.Event()

    def first() -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)
        leave.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, first)
    return leave


@asynccontextmanager
async def gateway(settings: Settings, life: Life | None = None) -> AsyncGenerator[str, None]:
    """A gateway listening while the block runs; yields its URL. Leaving the block drains it.

    It listens before its database is there; `life.serving` is set once it takes messages. Raises ParleyError, in a
    group, when the app crashes.
    """
    life = life or Life()
    app = _Ending(cors(create_app(settings, life), settings), life)
    async with serving(
        app,
        settings.host,
        settings.port,
        unacknowledged_s=settings.sse_send_timeout_s,
        headers=_headers(settings),
    ) as url:
        try:
            yield url
        finally:
            life.leave.set()
            await life.drained.wait()


def _headers(settings: Settings) -> list[tuple[str, str]]:
    """Of every answer, also those that the app knows nothing of."""
    hsts = [("Strict-Transport-Security", f"max-age={settings.hsts_s}")] if settings.hsts_s else []
    return [*_SAFE, *hsts]


class _Ending:
    """ASGI: an app whose lifespan is over has drained, also when a crash was the end of it."""

    def __init__(self, app: ASGIApp, life: Life) -> None:
        self._app = app
        self._life = life

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        finally:
            if scope["type"] == "lifespan":
                self._life.drained.set()


@asynccontextmanager
async def serving(
    app: ASGIApp,
    host: str,
    port: int,
    *,
    unacknowledged_s: float = _UNACKNOWLEDGED_S,
    headers: Sequence[tuple[str, str]] = (),
    head_s: float = connection.HEAD_S,
) -> AsyncGenerator[str, None]:
    """Any app served while the block runs, each answer with these headers; yields its URL."""
    listener = bind(host, port, unacknowledged_s=unacknowledged_s)
    server = _Server(_configuration(app, headers, head_s))
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(server.serve_until_told(listener))
        try:
            while not server.started and not running.done():
                await asyncio.sleep(0.01)
            name = f"[{host}]" if ":" in host else host
            yield f"http://{name}:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            # Here, not in the task group: after an error in the block that would cancel it instead of waiting.
            await asyncio.wait([running])


def _configuration(app: ASGIApp, headers: Sequence[tuple[str, str]], head_s: float) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=partial(connection.Connection, head_s=head_s),  # type: ignore[arg-type]
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        headers=list(headers),
        proxy_headers=False,  # app/access/client.py believes fewer, and those that the settings name
        timeout_graceful_shutdown=_CLOSE_S,
        timeout_keep_alive=75,
    )
