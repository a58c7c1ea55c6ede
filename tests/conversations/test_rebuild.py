"""The index built anew beside the old one: nobody notices, nothing is lost, and what stands there is the same table."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial
from random import Random
from typing import Any

import asyncpg
import httpx2
import pytest

from app.access.audit import Actor
from app.conversations import upkeep
from app.conversations.index import Chat
from app.conversations.rebuild import VERSION, Rebuilt, rebuild
from app.errors import Conflict
from tests.conversations.counted import agreed
from tests.conversations.savers import Saver
from tests.conversations.test_reconcile import pool_of
from tests.serving import serving

_CHATS = [Chat(user, f"{user}{number}", "shop") for user in ("ann", "bob") for number in range(10)]
_FOREIGN = """
insert into conversations (source, username, conversation_id, first_message_at, last_message_at, time_source,
    message_count, total_tokens, message_ids)
select 'n8n', '', 'n' || n, now(), now(), 'discovery', 2, 0, '{7,8}' from generate_series(1, $1) n
"""
_SHAPE = [
    "select indexname, indexdef from pg_indexes where tablename like 'conversations%' order by 1",
    "select policyname, permissive, roles, cmd, qual, with_check from pg_policies where tablename = 'conversations'"
    " order by 1",
    "select c.relrowsecurity, c.reloptions, c.relacl::text, pg_get_serial_sequence('conversations', 'id'), c.relkind"
    " from pg_class c where c.oid = 'conversations'::regclass",
    "select conname, pg_get_constraintdef(oid) from pg_constraint where conrelid = 'conversations'::regclass"
    " order by 1",
    "select attname, atttypid, attnotnull, attidentity, attstorage from pg_attribute"
    " where attrelid = 'conversations'::regclass and attnum > 0 order by attname",
    "select tgname from pg_trigger where tgrelid = 'conversations'::regclass",
    "select relname from pg_class where relname like 'conversation%' order by 1",
    "select proname from pg_proc where proname like 'conversation%'",
]


@asynccontextmanager
async def _connected(database: str) -> AsyncGenerator[asyncpg.Connection, None]:
    connection = await asyncpg.connect(database)
    try:
        yield connection
    finally:
        await connection.close()


async def _shape(connection: asyncpg.Connection) -> list[list[tuple[Any, ...]]]:
    return [[tuple(row) for row in await connection.fetch(query)] for query in _SHAPE]


async def _foreign(connection: asyncpg.Connection, count: int) -> None:
    await connection.execute(_FOREIGN, count)
    await connection.execute("insert into conversation_counts values ('n8n', 0, $1)", count)


async def _agree(connection: asyncpg.Connection, foreign: int) -> None:
    """Our own as `agreed` says; others are there, each once."""
    assert await connection.fetchval("select count(*) from conversations where source = 'n8n'") == foreign
    counted = await connection.fetchval("select sum(conversations) from conversation_counts where source = 'n8n'")
    assert counted == foreign
    await connection.execute("""
        with gone as (delete from conversations where source = 'n8n' returning id)
        delete from conversation_words using gone where conversation = id
    """)
    await connection.execute("delete from conversation_counts where source = 'n8n'")
    await agreed(connection)


async def test_the_same_table_stands_there_afterwards(database: str) -> None:
    async with _connected(database) as connection:
        saver = Saver(connection, Random(1))
        for chat in _CHATS:
            await saver.save(chat)
        await _foreign(connection, 3)
        before, rows = await _shape(connection), await connection.fetch("select * from conversations order by id")
        await connection.execute("update conversations set message_count = 99 where username = 'bob'")
        rebuilt = await rebuild(connection)
        assert await _shape(connection) == before
        assert await connection.fetch("select * from conversations order by id") == rows
        assert dict(rebuilt.conversations) == {"parley": len(_CHATS), "n8n": 3}
        # The next id is one that nobody had.
        await saver.save(Chat("eve", "new", "shop"))
        newest = await connection.fetchval("select id from conversations where username = 'eve'")
        assert newest > max(row["id"] for row in rows)
        await _agree(connection, 3)


async def test_lists_and_messages_go_on_while_it_is_rebuilt(database: str) -> None:
    """Cursors from before it stay good, too."""
    async with _connected(database) as ours, _connected(database) as one, _connected(database) as other:
        savers = [Saver(one, Random(1)), Saver(other, Random(2))]
        for chat in _CHATS:
            await savers[0].save(chat)
        await _foreign(ours, 30)
        done = asyncio.Event()
        # The lock keeps the leader of the server from taking this for what a killed rebuild has left.
        async with (
            upkeep.alone(database) as alone,
            serving(database, drain_s=0, enable_background_jobs=False) as client,
            asyncio.TaskGroup() as tasks,
        ):
            first = await _page(client, size=7)
            tasks.create_task(_save(savers[0], done))
            tasks.create_task(_save(savers[1], done, new="eve"))
            tasks.create_task(_change(database, done))
            reading = [tasks.create_task(_read(client, done, username)) for username in (None, "ann")]
            for _ in range(2):
                await rebuild(alone)
            done.set()
            seen = [entry["conversationId"] for entry in first["conversations"]]
            page = first
            while page["nextCursor"]:
                page = await _page(client, size=7, cursor=page["nextCursor"])
                seen += [entry["conversationId"] for entry in page["conversations"]]
        assert {f"n{n}" for n in range(1, 31)} <= set(seen)
        assert len(seen) == len(set(seen))
        assert all([await read > 3 for read in reading])
        await _agree(ours, 30)


async def _page(client: httpx2.AsyncClient, **params: Any) -> dict[str, Any]:
    response = await client.get("/api/messages/conversations", params=params)
    assert response.status_code == 200, response.text
    page: dict[str, Any] = response.json()
    return page


async def _read(client: httpx2.AsyncClient, done: asyncio.Event, username: str | None) -> int:
    """Until it is done; returns how often."""
    times = 0
    while not done.is_set():
        page = await _page(client, size=50, **({"username": username} if username else {}))
        assert len(page["conversations"]) >= (10 if username else len(_CHATS) + 30)
        assert page["total"] >= len(page["conversations"]) if username else True
        times += 1
    return times


async def _save(saver: Saver, done: asyncio.Event, new: str | None = None) -> None:
    number, chance = 0, Random(3)
    while not done.is_set():
        number += 1
        await saver.save(Chat(new, f"{new}{number}", "shop") if new else chance.choice(_CHATS))


async def _change(database: str, done: asyncio.Event) -> None:
    """As passes over another source do."""
    async with _connected(database) as connection:
        while not done.is_set():
            await connection.execute("update conversations set message_count = message_count + 1 where source = 'n8n'")


async def test_who_finds_nothing_to_look_after_is_in_nobodys_way(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For so long a sync would be refused."""
    monkeypatch.setattr(upkeep, "alone", None)
    async with pool_of(database) as pool:
        assert await upkeep.Upkeep(pool, database).run_once() == 0


async def test_only_one_looks_after_the_index_and_a_killed_one_frees_it(database: str) -> None:
    async with _connected(database) as watching, pool_of(database) as pool:
        keeper = upkeep.Upkeep(pool, database)
        with pytest.raises(Conflict, match="under way"):
            async with upkeep.alone(database), upkeep.alone(database):
                pass
        await Saver(watching, Random(1)).save(_CHATS[0])
        shape = await _shape(watching)
        with pytest.raises(Exception, match="went away"):
            async with upkeep.alone(database) as connection:
                await rebuild(connection, lambda now: _kill(now.phase, connection))
        assert await _shape(watching) != shape, "the trigger is left"
        await Saver(watching, Random(1)).save(_CHATS[0])
        assert await keeper.run_once() == 1
        assert await _shape(watching) == shape
        assert await keeper.run_once() == 0
        await watching.execute("update conversation_words set said_at = now()")  # as the migration leaves it
        await watching.execute("update conversation_index set version = 1")
        assert await keeper.run_once() == 1, "of an older schema"
        assert await watching.fetchval("select version from conversation_index") == VERSION
        assert await _shape(watching) == shape
        await agreed(watching)


def _kill(phase: str, connection: Any) -> None:
    if phase == "indexes":
        connection.terminate()


async def test_deleted_and_brought_back(database: str) -> None:
    async with _connected(database) as connection:
        saver = Saver(connection, Random(1))
        for chat in _CHATS:
            await saver.save(chat)
        await _foreign(connection, 3)
        async with upkeep.alone(database) as own:
            assert await upkeep.delete(own, Actor("command:test"))
            assert not (await upkeep.stats(own)).exists
            with pytest.raises(Conflict, match="init"):
                await upkeep.sync(own)
            # Messages are saved all the same.
            await saver.save(_CHATS[0])
            assert not await upkeep.delete(own, Actor("command:test"))
            await saver.save(_CHATS[0])
            assert await upkeep.init(own)
            assert not await upkeep.init(own)
            synced = await upkeep.sync(own)
        assert (synced.found, synced.messages, synced.failures) == (len(_CHATS), 2 * len(_CHATS) + 4, 0)
        await agreed(connection)
        assert await connection.fetchval("select count(*) from audit where action = 'index.delete'") == 2


async def test_what_depends_on_the_table_keeps_it(database: str) -> None:
    async with _connected(database) as connection:
        shape = await _shape(connection)
        await connection.execute("create view mine as select conversation_id from conversations")
        with pytest.raises(Conflict, match="view mine depends"):
            await rebuild(connection)
        assert await _shape(connection) == shape


async def test_who_leaves_a_rebuild_leaves_nothing_behind(database: str) -> None:
    async with _connected(database) as connection:
        await Saver(connection, Random(1)).save(_CHATS[0])
        shape = await _shape(connection)
        for phase in ("fill", "indexes", "swap"):
            with pytest.raises(asyncio.CancelledError):
                await asyncio.create_task(rebuild(connection, partial(_leave, phase)))
            assert await _shape(connection) == shape
        await agreed(connection)


def _leave(at: str, now: Rebuilt) -> None:
    task = asyncio.current_task()
    if now.phase == at and task is not None:
        task.cancel()
