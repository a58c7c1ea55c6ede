"""D12: a real PgBouncer in transaction mode is refused with what to do, in every way it may be configured."""

import asyncio
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import asyncpg
import pytest

from app.errors import Misconfigured
from app.postgres import wait_for_database
from tests.command import run, running

PGBOUNCER = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")

if PGBOUNCER is None and os.environ.get("CI") != "true":
    pytest.skip("needs pgbouncer (Debian: apt-get install pgbouncer)", allow_module_level=True)

CONFIGURATION = """
[databases]
{name} = host={folder} port={port} dbname={name} user=parley
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {listen}
unix_socket_dir =
auth_type = any
pool_mode = {mode}
logfile = {folder_of_its_own}/log
pidfile = {folder_of_its_own}/pid
{more}
"""
IGNORING = "ignore_startup_parameters = lock_timeout,idle_in_transaction_session_timeout,plan_cache_mode,search_path"


@asynccontextmanager
async def pooled(database: str, mode: str, more: str) -> AsyncGenerator[str, None]:
    """The DSN of a database through a PgBouncer."""
    query = parse_qs(urlsplit(database).query)
    name = urlsplit(database).path[1:]
    with tempfile.TemporaryDirectory(prefix="parley-test-") as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        Path(folder).chmod(0o777)
        places = {"name": name, "folder": query["host"][0], "port": query["port"][0], "folder_of_its_own": folder}
        configuration = Path(folder) / "pgbouncer.ini"
        configuration.write_text(CONFIGURATION.format(**places, listen=port, mode=mode, more=more))
        assert PGBOUNCER is not None
        # It refuses to run as root, and only the account of our PostgreSQL may enter the folder of its socket.
        account = Path(places["folder"]).stat().st_uid
        process = await asyncio.create_subprocess_exec(PGBOUNCER, "-q", str(configuration), user=account)
        try:
            await _listens(port)
            yield f"postgresql://parley@127.0.0.1:{port}/{name}?sslmode=disable"
        finally:
            process.send_signal(signal.SIGKILL)
            await process.wait()


async def _listens(port: int) -> None:
    async with asyncio.timeout(10):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.02)
            else:
                writer.close()
                return


# What its administrator may add so that everything connects, and does not work.
SETTLED = "settled"


@pytest.mark.parametrize("more", ["", IGNORING, SETTLED])
async def test_d12_a_pooler_in_transaction_mode_is_refused_with_what_to_do(database: str, more: str) -> None:
    if more == SETTLED:
        await _settle(database)
    async with pooled(database, "transaction", IGNORING if more == SETTLED else more) as dsn:
        with pytest.raises(Misconfigured, match="Name the host and port of PostgreSQL itself") as refused:
            await wait_for_database(dsn, 5, pytest.fail)
        assert refused.value.code == "database_pooler"


async def test_d12_a_server_behind_it_waits_and_says_so(database: str) -> None:
    async with pooled(database, "transaction", IGNORING) as dsn:
        async with running("serve", PARLEY_PORT="0", PARLEY_LOG_FORMAT="text", DATABASE_URL=dsn) as command:
            assert "connection pooler" in await command.says("database_waiting")
            done = await command.stop()
        assert done.code == 0
        told = await run("doctor", DATABASE_URL=dsn)
        assert told.code == 1
        assert any("connection pooler" in line for line in told.out), told


async def test_d12_sessions_of_ones_own_are_fine_behind_a_pooler(database: str) -> None:
    await _settle(database)
    async with pooled(database, "session", IGNORING) as dsn:
        await wait_for_database(dsn, 5, pytest.fail)


async def _settle(database: str) -> None:
    """The settings that the pooler drops, for everybody."""
    connection = await asyncpg.connect(database)
    name = await connection.fetchval("select current_database()")
    await connection.execute(f"alter database {name} set lock_timeout = '2s'")
    await connection.close()
