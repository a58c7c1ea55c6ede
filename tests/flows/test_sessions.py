"""Who occupies a session at the same time as others of its user counts them, in whichever order they come."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager

import asyncpg

from app.flows import sessions
from app.flows.sessions import Occupied

_WAITS = "select cardinality(pg_blocking_pids($1)) > 0"


@asynccontextmanager
async def connections(dsn: str, many: int) -> AsyncGenerator[list[asyncpg.Connection], None]:
    async with AsyncExitStack() as stack:
        opened = []
        for _ in range(many):
            opened.append(await asyncpg.connect(dsn))
            stack.push_async_callback(opened[-1].close)
        yield opened


async def occupy(connection: asyncpg.Connection, session_id: str, user_id: str = "ann") -> Occupied | None:
    return await sessions.occupy(connection, user_id=user_id, session_id=session_id, chatbot_id="shop")


async def test_who_had_to_wait_does_not_believe_what_it_counted(database: str) -> None:
    async with connections(database, 3) as (first, second, looking):
        async with first.transaction():
            mine = await occupy(first, "a")
            assert mine is not None
            assert (mine.seq, mine.others) == (1, 0)
            async with second.transaction():
                waiting = asyncio.create_task(occupy(second, "b"))
                while not await looking.fetchval(_WAITS, second.get_server_pid()):
                    await asyncio.sleep(0)
                await first.execute("commit")
                late = await waiting
                assert late is not None
                assert (late.seq, late.others) == (2, None)
                assert await sessions.active_elsewhere(second, user_id="ann", session_id="b") == 1
            await first.execute("begin")
        # Nobody was in between: what the statement saw is all there is.
        last = await occupy(looking, "c")
        assert last is not None
        assert (last.seq, last.others) == (3, 2)


async def test_a_busy_session_moves_nothing_and_nobody_is_not_counted(database: str) -> None:
    async with connections(database, 1) as (connection,):
        assert await occupy(connection, "a") is not None
        assert await occupy(connection, "a") is None
        assert await connection.fetchval("select seq from sync_head where user_id = 'ann'") == 1
        for session in ("b", "c"):
            nobody = await occupy(connection, session, user_id="")
            assert nobody is not None
            assert nobody.seq == 0
        assert await connection.fetchval("select count(*) from sync_head") == 1
