"""The server around an app: ends when the app's inside has crashed, and names what keeps it from starting."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest
from starlette.applications import Starlette

from app.errors import Misconfigured, ParleyError
from app.server import bind, serving


async def test_half_a_server_does_not_go_on_listening() -> None:
    """One that answers /livez and never serves again would be restarted by nobody."""
    crash = asyncio.Event()

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncGenerator[None, None]:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(crashing())
            yield

    async def crashing() -> None:
        await crash.wait()
        raise RuntimeError("a bug")

    with pytest.RaisesGroup(pytest.RaisesExc(ParleyError, match="something inside it failed")):
        async with asyncio.timeout(10), serving(Starlette(lifespan=lifespan), "127.0.0.1", 0):
            crash.set()
            await asyncio.Event().wait()


async def test_a_taken_port_is_named() -> None:
    with bind("127.0.0.1", 0) as taken, pytest.raises(Misconfigured, match="set PARLEY_PORT"):
        bind("127.0.0.1", taken.getsockname()[1])
