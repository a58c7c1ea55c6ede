"""The proxy does to connections what the tests of faults say it does."""

import asyncio

import asyncpg
import pytest

from tests.proxy import proxy_to_postgres


async def test_what_is_stalled_arrives_late(database: str) -> None:
    async with proxy_to_postgres(database) as (proxy, dsn):
        connection = await asyncpg.connect(dsn)
        proxy.stall()
        asked = asyncio.ensure_future(connection.fetchval("select 1"))
        late = asyncio.ensure_future(asyncpg.connect(dsn))
        done, _ = await asyncio.wait([asked, late], timeout=0.2)
        assert not done
        proxy.open()
        assert await asked == 1
        await (await late).close()
        await connection.close()


async def test_a_server_hears_what_it_cannot_answer(database: str) -> None:
    async with proxy_to_postgres(database) as (proxy, dsn):
        look, connection = await asyncpg.connect(database), await asyncpg.connect(dsn)
        proxy.stall(answers_only=True)
        asked = asyncio.ensure_future(connection.execute("create table heard (id int)"))
        async with asyncio.timeout(5):
            while await look.fetchval("select to_regclass('heard')") is None:
                await asyncio.sleep(0.01)
        assert not asked.done()
        proxy.cut()
        with pytest.raises((asyncpg.PostgresConnectionError, OSError)):
            await asked
        proxy.open()
        await (await asyncpg.connect(dsn)).close()
        await look.close()


async def test_cut_breaks_what_is_open_and_close_refuses_what_is_new(database: str) -> None:
    async with proxy_to_postgres(database) as (proxy, dsn):
        connection = await asyncpg.connect(dsn)
        assert proxy.connections == 1
        proxy.cut()
        with pytest.raises((asyncpg.PostgresConnectionError, asyncpg.InterfaceError, OSError)):
            await connection.fetchval("select 1")
        proxy.close()
        with pytest.raises((asyncpg.PostgresConnectionError, OSError)):
            await asyncpg.connect(dsn)
        proxy.open()
        connection = await asyncpg.connect(dsn)
        assert await connection.fetchval("select 1") == 1
        await connection.close()
