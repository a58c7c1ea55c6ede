"""Our own conversations counted anew: exact, whatever is saved meanwhile."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from random import Random
from typing import Any

import asyncpg
import pytest

from app.conversations.index import Chat
from app.conversations.recount import recount
from tests.conversations.counted import agreed
from tests.conversations.savers import Saver

_EMPTIED = "truncate conversations, conversation_words, conversation_counts"
_CHATS = [Chat(user, f"{user}{number}", "shop") for user in ("ann", "bob") for number in range(3)]


@asynccontextmanager
async def _connections(database: str, how_many: int) -> AsyncGenerator[list[asyncpg.Connection], None]:
    async with AsyncExitStack() as stack:
        opened = [await asyncpg.connect(database) for _ in range(how_many)]
        for connection in opened:
            stack.push_async_callback(connection.close)
        yield opened


@pytest.mark.parametrize("seed", range(3))
async def test_counted_while_messages_are_saved_it_is_exact(database: str, seed: int) -> None:
    chance = Random(seed)
    async with _connections(database, 5) as [ours, *theirs]:
        savers = [Saver(connection, Random(chance.random())) for connection in theirs]
        for chat in _CHATS[:3]:
            await savers[0].save(chat)
        await _spoil(ours)
        passes = 0

        async def run(saver: Saver) -> None:
            while passes < 3:
                await saver.save(chance.choice(_CHATS))

        async with asyncio.TaskGroup() as tasks:
            for saver in savers:
                tasks.create_task(run(saver))
            # The first repairs what was spoilt; none may spoil what it overtakes.
            for passes in range(1, 4):  # noqa: B007
                await recount(ours, batch=2)
        await agreed(ours)


async def test_who_is_making_a_conversation_is_waited_for(database: str) -> None:
    async with _connections(database, 3) as [ours, theirs, watching]:
        saver = Saver(theirs, Random(1))
        await saver.save(_CHATS[0])
        await _spoil(ours)
        async with theirs.transaction():
            await saver.save(_CHATS[0])
            counting = asyncio.create_task(recount(ours))
            await _blocked(watching, ours, counting)
        await counting
        await agreed(ours)


async def test_who_is_changing_a_conversation_is_waited_for(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Whoever begins after missing rows were made meets the lock alone.
    monkeypatch.setattr("app.conversations.recount._MAKE", "select where false and $1 = $2::text[]")
    async with _connections(database, 3) as [ours, theirs, watching]:
        saver = Saver(theirs, Random(1))
        stream = await saver.save(_CHATS[0], ends=False)
        await ours.execute("update conversations set message_count = 7")
        async with theirs.transaction():
            await saver.end(stream, _CHATS[0])
            counting = asyncio.create_task(recount(ours))
            await _blocked(watching, ours, counting)
        await counting
        await agreed(ours)


async def _blocked(watching: asyncpg.Connection, ours: asyncpg.Connection, task: asyncio.Task[Any]) -> None:
    async with asyncio.timeout(10):
        while not await watching.fetchval("select cardinality(pg_blocking_pids($1))", ours.get_server_pid()):
            assert not task.done()
            await asyncio.sleep(0.01)


async def test_what_a_run_has_cost_so_far_is_counted_once(database: str) -> None:
    async with _connections(database, 1) as [connection]:
        saver = Saver(connection, Random(1))
        stream = await saver.save(_CHATS[0], ends=False)
        await recount(connection)
        await saver.end(stream, _CHATS[0])
        await agreed(connection)


async def _spoil(connection: asyncpg.Connection) -> None:
    await connection.execute(_EMPTIED)


async def test_what_the_index_says_wrongly_is_put_right(database: str) -> None:
    async with _connections(database, 1) as [connection]:
        saver = Saver(connection, Random(1))
        for chat in _CHATS:
            await saver.save(chat)
        assert (await recount(connection)).written == 0, "what is right is not written"
        rows = await connection.fetch(_IDENTITY)
        await connection.execute(
            "update conversations set message_count = 7, first_question = 'no' where username = 'bob'"
        )
        await connection.execute("update conversations set conversation_id = 'nowhere' where conversation_id = 'ann0'")
        done = await recount(connection)
        assert (done.found, done.of, done.messages, done.failures) == (6, 6, 12, 0)
        assert done.written == 5
        assert (await recount(connection)).written == 0
        await agreed(connection)
        after = await connection.fetch(_IDENTITY)
        assert [row for row in after if row["conversation_id"] != "ann0"] == rows[1:], "ids and addresses are kept"
        made = await connection.fetchrow("select chatbot_id, model from conversations where conversation_id = 'ann0'")
        assert made is not None
        assert tuple(made) == ("shop", "small")


_IDENTITY = "select id, conversation_id, client_ip, created_at from conversations order by conversation_id"


async def test_a_conversation_that_somebody_holds_is_named_and_the_others_counted(database: str) -> None:
    async with _connections(database, 2) as [connection, other]:
        saver = Saver(connection, Random(1))
        for chat in _CHATS:
            await saver.save(chat)
        await connection.execute("update conversations set message_count = 7")
        await connection.execute("set lock_timeout = '20ms'")
        async with other.transaction():
            await other.execute("select from conversations where conversation_id = 'bob1' for update")
            done = await recount(connection)
        assert [(failed.source, failed.id) for failed in done.failed] == [("parley", "bob1")]
        assert done.written == 5
        assert (await recount(connection)).written == 1
        await agreed(connection)
