"""What every test may ask for: a real PostgreSQL, started when first needed, and a fresh migrated database.

PARLEY_TEST_DATABASE_URL names another server to use; its role must be allowed to create databases.
"""

import asyncio
import os
import shutil
import tempfile
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

import asyncpg
import hypothesis
import pytest

from app.embedded import embedded_postgres

# What the tests' own modules assert says what it saw, as theirs does.
pytest.register_assert_rewrite(
    *("tests.command", "tests.house", "tests.reader", "tests.sse", "tests.providers.answers"),
    *("tests.conversations.counted", "tests.conversations.listed", "tests.sync.storm"),
)

# Nothing here fails because a machine is slow: neither an example nor the making of one is timed.
hypothesis.settings.register_profile(
    "unhurried", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("unhurried")

if TYPE_CHECKING:
    from tests.house import Open

T = TypeVar("T")

# A test's data may be lost with the machine; synchronous_commit stays on, as the log's answers depend on it.
_SERVER = {
    "fsync": "off",
    "full_page_writes": "off",
    "max_connections": "300",
    "max_prepared_transactions": "50",
    "log_min_messages": "fatal",
}


class Server:
    """A PostgreSQL and an administrator's connection, driven from a thread with a loop of its own.

    A session fixture may not be tied to the loop of one test, and a test may block its own.
    """

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="test-postgres", daemon=True)
        self._thread.start()
        self._admin: asyncpg.Connection | None = None
        self._turn = asyncio.Lock()
        # One database of each template that is made while a test runs, and one that is dropped meanwhile.
        self._ahead: dict[str, Future[str]] = {}
        self._dropped: Future[None] | None = None

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._start(work).result()

    def _start(self, work: Coroutine[Any, Any, T]) -> "Future[T]":
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def execute(self, sql: str) -> None:
        self.run(self._execute(sql))

    async def _execute(self, sql: str) -> None:
        async with self._turn:
            if self._admin is None:
                self._admin = await asyncpg.connect(self.dsn)
            await self._admin.execute(sql)

    def create(self, *, template: str = "template0") -> str:
        """The name of a new database."""
        return self.run(self._create(template))

    async def _create(self, template: str) -> str:
        name = f"parley_test_{uuid4().hex}"
        await self._execute(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy")
        return name

    def take(self, template: str = "template0") -> str:
        """As `create`, for one after the other: the next one is made while this one is used."""
        made = self._ahead.pop(template, None) or self._start(self._create(template))
        name = made.result()
        self._ahead[template] = self._start(self._create(template))
        return name

    def drop(self, name: str) -> None:
        self.run(self._drop(name))

    async def _drop(self, name: str) -> None:
        await self._execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        # Roles belong to the whole server; what this one could do went with the database.
        await self._execute(f"""do $$ declare r text; begin
            for r in select rolname from pg_roles where rolname ~ '^parley_users_{name[:40]}_' loop
                execute format('drop role %I', r);
            end loop; end $$""")

    def leave(self, name: str) -> None:
        """As `drop`, while the next test runs; it raises what went wrong with the one before."""
        dropped, self._dropped = self._dropped, self._start(self._drop(name))
        if dropped is not None:
            dropped.result()

    def dsn_of(self, name: str) -> str:
        return urlunsplit(urlsplit(self.dsn)._replace(path=f"/{name}"))

    def settle(self) -> None:
        """Drop what was made ahead, and wait for what was left."""
        dropped, self._dropped = self._dropped, None
        while self._ahead:
            self.drop(self._ahead.popitem()[1].result())
        if dropped is not None:
            dropped.result()

    def close(self) -> None:
        self.settle()
        if self._admin is not None:
            self.run(self._admin.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@contextmanager
def _embedded() -> Iterator[str]:
    """The DSN of a throw-away server; its folder is one that the account PostgreSQL drops to can enter."""
    folder = Path(tempfile.mkdtemp(prefix="parley-test-"))
    folder.chmod(0o755)
    keeper = Server("")
    postgres = embedded_postgres(folder / "data", settings=_SERVER)
    try:
        yield keeper.run(postgres.__aenter__()).dsn
    finally:
        keeper.run(postgres.__aexit__(None, None, None))
        keeper.close()
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """The server all tests of this session share."""
    given = os.environ.get("PARLEY_TEST_DATABASE_URL")
    with _fixed(given) if given else _embedded() as dsn:
        shared = Server(dsn)
        yield shared
        shared.close()


@contextmanager
def _fixed(dsn: str) -> Iterator[str]:
    yield dsn


@pytest.fixture(scope="session")
def template(server: Server) -> Iterator[str]:
    """The name of a database migrated to head, which nobody is connected to."""
    from app.schema import migrate

    name = server.create()
    server.run(migrate(server.dsn_of(name)))
    yield name
    # A role is not dropped while a copy of its database is there.
    server.settle()
    server.drop(name)


@pytest.fixture
def database(server: Server, template: str) -> Iterator[str]:
    """The DSN of a fresh database at head, dropped afterwards with whoever is still connected."""
    name = server.take(template)
    yield server.dsn_of(name)
    server.leave(name)


@pytest.fixture
def empty_database(server: Server) -> Iterator[str]:
    """The DSN of a database without any tables, for the tests of migrations."""
    name = server.take()
    yield server.dsn_of(name)
    server.leave(name)


@pytest.fixture
def house(database: str) -> "Open":
    """`async with house({chatbot: model}, **settings) as home`: a gateway in this process."""
    from tests.house import open_house

    return partial(open_house, database)
