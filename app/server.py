"""One HTTP server around an app: our own signals, so that readers are served until answers have ended."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager

import uvicorn
from starlette.types import ASGIApp

from app.errors import Misconfigured
from app.main import Life, create_app
from app.settings import Settings

# What is left after draining: responses that end by themselves within this time.
_CLOSE_S = 5
_BACKLOG = 2048


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        # uvicorn would close its listeners at once on SIGTERM; whoever runs us decides when to leave.
        yield


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises Misconfigured with what to do where the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise Misconfigured(
            "port_taken", f"Cannot listen on {host}:{port} ({error.strerror}); set PARLEY_PORT or PARLEY_HOST."
        ) from None
    listener.listen(_BACKLOG)
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

    It listens before its database is there; `life.serving` is set once it takes messages.
    """
    life = life or Life()
    async with serving(create_app(settings, life), settings.host, settings.port) as url:
        try:
            yield url
        finally:
            life.leave.set()
            await life.drained.wait()


@asynccontextmanager
async def serving(app: ASGIApp, host: str, port: int) -> AsyncGenerator[str, None]:
    """Any app served while the block runs; yields its URL."""
    listener = bind(host, port)
    server = _Server(
        uvicorn.Config(
            app,
            http="httptools",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_CLOSE_S,
            timeout_keep_alive=75,
        )
    )
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(server.serve(sockets=[listener]))
        try:
            while not server.started:
                await asyncio.sleep(0.01)
            name = f"[{host}]" if ":" in host else host
            yield f"http://{name}:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
