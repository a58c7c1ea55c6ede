"""A migration of a database in use: it waits for tables without having everybody wait behind it."""

import asyncio

import asyncpg
import pytest

from app import schema
from app.conversations import rebuild
from app.conversations.replacement import Replacement
from app.errors import Misconfigured
from app.schema import migrate, pending
from tests.migrating import migrate_to

_WAITS = "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()"


async def test_who_holds_a_table_is_waited_for_and_others_read_it_meanwhile(
    empty_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "_LOCK_TIMEOUT", "100ms")
    monkeypatch.setattr(schema, "_PAUSE_S", 0.05)
    await migrate_to(empty_database, "0021")
    holding, reading = await asyncpg.connect(empty_database), await asyncpg.connect(empty_database)
    try:
        async with holding.transaction():
            await holding.execute("select from chats")
            migrating = asyncio.create_task(migrate(empty_database, role=False))
            for _ in range(3):  # it waits again and again, and in between everybody reads
                while not await reading.fetchval(_WAITS):
                    await asyncio.sleep(0)
                await reading.execute("select from chats", timeout=2)
                while await reading.fetchval(_WAITS):
                    await asyncio.sleep(0)
            assert not migrating.done()
        await migrating
        assert await pending(reading) == []
    finally:
        await holding.close()
        await reading.close()


async def test_it_gives_up_with_a_sentence_and_goes_on_later(
    empty_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "_LOCK_TIMEOUT", "10ms")
    monkeypatch.setattr(schema, "_PATIENCE_S", 0)
    await migrate_to(empty_database, "0021")
    holding = await asyncpg.connect(empty_database)
    try:
        async with holding.transaction():
            await holding.execute("select from chats")
            with pytest.raises(Misconfigured, match="run it again"):
                await migrate(empty_database, role=False)
        assert "0022" in (await migrate(empty_database, role=False)).revisions
    finally:
        await holding.close()


@pytest.mark.parametrize("revision", ["0023", "0031"])
async def test_what_a_killed_rebuild_of_the_index_has_left_is_in_nobodys_way(
    empty_database: str, revision: str
) -> None:
    await migrate_to(empty_database, revision)
    connection = await asyncpg.connect(empty_database)
    try:
        for statement in rebuild._WATCH:
            await connection.execute(statement)
        left = await Replacement.made(connection, "conversations")
        for index in left.indexes:
            await left.index(connection, index)
        await migrate(empty_database, role=False)
        assert not await rebuild.clean_up(connection)
    finally:
        await connection.close()
