"""A source on a hot standby, which shows nobody's locks: what commits late is found, and drift is put right."""

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest

from app.conversations import rounds, source_state
from app.conversations.batch import Bounds, Found
from app.conversations.foreign import Foreign
from app.conversations.passes import Passes
from app.conversations.reconcile import Reconcile
from app.conversations.sources.reading import open_source
from app.conversations.sources.recognition import recognise
from app.conversations.sources.source import Source, all_sources, apply_sources
from app.embedded import embedded_postgres
from app.embedded.account import Account, account_for
from app.embedded.binaries import find_binaries, reachable
from app.postgres import Pool, open_pool
from app.telemetry import Metrics

_SERVER = {"fsync": "off", "full_page_writes": "on", "autovacuum": "off"}
_LOG = "create table log (id serial primary key, session_id varchar(255) not null, message jsonb not null)"
_FLOWISE = """
create table chat_message (id uuid primary key default gen_random_uuid(), role varchar not null, chatflowid varchar,
    content text not null, "chatId" varchar not null default 'c', "sessionId" varchar,
    "createdDate" timestamp not null default now())
"""
_SAY = """
insert into log (session_id, message)
select 's' || n % 7, '{"type": "human", "content": "Why?", "additional_kwargs": {}, "response_metadata": {}}'
from generate_series(1, $1::int) n
"""
_LATE = """
insert into log (session_id, message) values ('late', '{"type": "human", "content": "I", "additional_kwargs": {}}')
"""
_WRITE = """
insert into chat_message (role, chatflowid, content, "sessionId")
select 'userMessage', 'f', 'Why?', 's' || n % 7 from generate_series(1, $1::int) n
"""
_PATIENCE_S = 30


@asynccontextmanager
async def standby_of(primary: str, folder: Path) -> AsyncGenerator[str, None]:
    """The DSN of a hot standby that follows a primary on this machine; its data is made in `folder`."""
    account = account_for(folder)
    programs = reachable(find_binaries(None), account, data_dir=folder.parent).bin
    parts = urlsplit(primary)
    folder.mkdir(mode=0o700)
    os.chown(folder, account.uid, account.gid)
    copying = await _run(
        account, programs / "pg_basebackup", "-D", folder / "data", "-d", urlunsplit(parts._replace(path="")),
        "-R", "-X", "stream", "-c", "fast", "--no-sync",
    )  # fmt: skip
    assert await copying.wait() == 0
    server = await _run(
        account, programs / "postgres", "-D", folder / "data", "-c", f"unix_socket_directories={folder}",
        "-c", "listen_addresses=", "-c", "fsync=off", "-c", "port=5432", "-c", "max_standby_streaming_delay=30s",
    )  # fmt: skip
    try:
        dsn = f"postgresql://parley@{parts.path}?host={folder}&port=5432"
        await _answers(dsn)
        yield dsn
    finally:
        server.terminate()
        await server.wait()


async def _run(account: Account, *command: object) -> asyncio.subprocess.Process:
    other = {} if account.is_ours else {"user": account.uid, "group": account.gid, "extra_groups": ()}
    return await asyncio.create_subprocess_exec(
        *map(str, command),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        cwd="/",
        **other,  # type: ignore[arg-type]
    )


async def _answers(dsn: str) -> None:
    async with asyncio.timeout(_PATIENCE_S):
        while True:
            try:
                await (await asyncpg.connect(dsn)).close()
            except (OSError, asyncpg.PostgresError):
                await asyncio.sleep(0.02)
            else:
                return


class Site:
    """A source whose table is read at the standby, and written at its primary."""

    def __init__(self, pool: Pool, primary: asyncpg.Connection, late: asyncpg.Connection, standby: asyncpg.Connection):
        self.primary, self.late, self._standby = primary, late, standby
        self.passes = Passes(pool=pool, bounds=Bounds(grace_s=0, standby_grace_s=0), metrics=Metrics(), failing=set())
        self.reconcile = Reconcile(pool=pool, passes=self.passes, metrics=self.passes.metrics)

    async def discover(self, name: str) -> Found:
        """A pass, once everything that was committed has come to the standby."""
        at = await self.primary.fetchval("select pg_current_wal_insert_lsn()::text")
        async with asyncio.timeout(_PATIENCE_S):
            while not await self._standby.fetchval("select pg_last_wal_replay_lsn() >= $1::text::pg_lsn", at):
                await asyncio.sleep(0.01)
        async with self.passes.pool.acquire() as connection:
            (source,) = [one for one in await all_sources(connection) if one.id == name]
        result = await self.passes.run(source)
        assert result.error is None
        return result.found

    async def compared(self, name: str) -> rounds.Round:
        source = (await self.reconcile.sources())[name]
        while (piece := await self.reconcile.run(name, source, until=monotonic())) is None or piece.place is not None:
            pass
        return (await rounds.rounds(self.passes.pool))[name]

    async def settled(self, name: str) -> int:
        return (await source_state.load(self.passes.pool, name)).settled

    async def counts(self, name: str) -> dict[str, int]:
        rows = await self.passes.pool.fetch(
            "select conversation_id, message_count from conversations where source = $1", name
        )
        return {row[0]: row[1] for row in rows}


@pytest.fixture
async def site(database: str) -> AsyncGenerator[Site, None]:
    folder = Path(tempfile.mkdtemp(prefix="parley-test-"))
    folder.chmod(0o755)
    try:
        async with (
            embedded_postgres(folder / "primary", settings=_SERVER) as server,
            standby_of(server.dsn, folder / "standby") as standby,
        ):
            (folder / "dsn").write_text(standby)
            pool = await open_pool(database, 4)
            primary, late = [await asyncpg.connect(server.dsn) for _ in range(2)]
            look = await asyncpg.connect(standby)
            await primary.execute(_LOG)
            await primary.execute(_FLOWISE)
            dsn = f"file:{folder / 'dsn'}"
            async with pool.acquire() as connection:
                sources = [Source(name, dsn, name, code=name) for name in ("log", "chat_message")]
                await apply_sources(connection, sources)
            yield Site(pool, primary, late, look)
            for connected in (primary, late, look):
                await connected.close()
            await pool.close()
    finally:
        shutil.rmtree(folder)


async def test_g18_a_source_on_a_standby(site: Site) -> None:
    await site.primary.execute(_SAY, 70)
    assert (await site.discover("log")).rows == 70
    await site.discover("log")
    assert await site.settled("log") == 70
    connection = await open_source((await _source(site, "log")).dsn)
    look = await Foreign(connection, await recognise(connection, await _source(site, "log"))).look()
    assert (look.is_standby, look.writers) == (True, frozenset()), "it shows nobody's locks"
    await connection.close()

    # Drawn and written before the others, and committed after them: it is seen by its transaction alone.
    await site.late.execute("begin")
    await site.late.execute(_LATE)
    await site.primary.execute(_SAY, 7)
    found = [(await site.discover("log")).rows for _ in range(3)]
    assert found == [7, 0, 0]
    assert await site.settled("log") == 70
    await site.late.execute("commit")
    assert (await site.discover("log")).rows == 1
    await site.discover("log")
    assert await site.settled("log") == 78
    assert await site.counts("log") == {"late": 1} | {f"s{n}": 11 for n in range(7)}

    # Without a sequence: by the transactions that wrote the rows.
    await site.primary.execute(_WRITE, 70)
    assert (await site.discover("chat_message")).rows == 70
    await site.primary.execute(_WRITE, 7)
    assert (await site.discover("chat_message")).rows == 7
    assert (await site.discover("chat_message")).rows == 0
    assert await site.counts("chat_message") == {f"s{n}": 11 for n in range(7)}

    for name, session in (("log", "session_id"), ("chat_message", '"sessionId"')):
        assert (await site.compared(name)).drift == 0
        await site.primary.execute(f"delete from {name} where {session} = 's3'")
        await site.discover(name)
        found_wrong = await site.compared(name)
        assert (found_wrong.drift, found_wrong.error) == (1, None)
        assert "s3" not in await site.counts(name)


async def _source(site: Site, name: str) -> Source:
    async with site.passes.pool.acquire() as connection:
        return next(one for one in await all_sources(connection) if one.id == name)
