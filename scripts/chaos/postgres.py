"""A PostgreSQL of one's own that can be stopped, crashed and started again."""

import asyncio
import os
import signal
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from app.embedded import EmbeddedPostgres, embedded_postgres


class Postgres:
    """One data folder, and a server over it or none at the moment."""

    def __init__(self, folder: Path, settings: Mapping[str, str]) -> None:
        self._folder = folder
        self._settings = settings
        self._stack = AsyncExitStack()
        self._server: EmbeddedPostgres | None = None

    @property
    def dsn(self) -> str:
        """The way over the socket; valid while it runs."""
        assert self._server is not None
        return self._server.dsn

    async def start(self) -> None:
        self._server = await self._stack.enter_async_context(embedded_postgres(self._folder, settings=self._settings))

    async def stop(self) -> None:
        """The fast way: connections are ended, what is open is rolled back."""
        self._server = None
        await self._stack.aclose()

    async def crash(self) -> None:
        """The immediate way: everybody is gone at once, and the next start recovers from the log."""
        assert self._server is not None
        os.kill(self._pid, signal.SIGQUIT)
        await self._server.wait()
        await self.stop()

    @property
    def _pid(self) -> int:
        assert self._server is not None
        return int((self._server.data_dir / "postgres" / "data" / "postmaster.pid").read_text().split()[0])

    async def dial(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection to wherever it listens now. Raises OSError while it is down."""
        if self._server is None:
            raise ConnectionRefusedError
        query = parse_qs(urlsplit(self._server.dsn).query)
        return await asyncio.open_unix_connection(f"{query['host'][0]}/.s.PGSQL.{query['port'][0]}")


@asynccontextmanager
async def running_postgres(folder: Path, **settings: str) -> AsyncGenerator[Postgres, None]:
    """It runs when the block begins, and is down behind it."""
    postgres = Postgres(folder, settings)
    try:
        await postgres.start()
        yield postgres
    finally:
        await postgres.stop()
