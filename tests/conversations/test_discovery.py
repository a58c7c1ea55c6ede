"""Discovery of a table, one thing at a time: what is late, prepared, gone, locked, odd or very much of it."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from uuid import UUID

import asyncpg
import pytest

from app.conversations import serial, source_state
from app.conversations.batch import Bounds, Found
from app.conversations.discovery import Discovery
from app.conversations.foreign import Extent, Foreign, Swept
from app.conversations.ranges import LEAST
from app.conversations.source_state import State
from app.conversations.sources.recognition import newest_first, recognise
from app.conversations.sources.source import Source
from app.conversations.watermark import Look
from app.errors import Conflict
from app.postgres import Pool, open_pool
from tests.conversations.plain import MADE, MADE_OF_UUIDS, OF_UUIDS, Plain, alone, as_indexed, indexed, recounted


@dataclass
class Site:
    """Our database and theirs, with one connection of a writer."""

    pool: Pool
    theirs: asyncpg.Connection
    writer: asyncpg.Connection
    dsn: str
    shape: Plain

    async def discover(self, **bounds: float) -> Found:
        engine = Discovery(self.pool, replace(Bounds(grace_s=0), **bounds))  # type: ignore[arg-type]
        return await engine.discover("plain", Foreign(self.theirs, self.shape))

    async def agrees(self) -> bool:
        async with self.pool.acquire() as ours:
            return await indexed(ours) == as_indexed(await recounted(self.theirs, self.shape))  # type: ignore[arg-type]

    async def state(self) -> State:
        return await source_state.load(self.pool, "plain")


async def site_of(database: str, theirs: str, shape: Plain) -> AsyncGenerator[Site, None]:
    pool = await open_pool(database, 4)
    reader, writer = await asyncpg.connect(theirs), await asyncpg.connect(theirs)
    await writer.execute(MADE if shape.key.is_serial else MADE_OF_UUIDS)
    await reader.execute("set default_transaction_read_only = on; set lock_timeout = '100ms'")
    yield Site(pool, reader, writer, theirs, shape)
    await reader.close()
    await writer.close()
    await pool.close()


@pytest.fixture
async def site(database: str, empty_database: str) -> AsyncGenerator[Site, None]:
    async for made in site_of(database, empty_database, Plain()):
        yield made


@pytest.fixture
async def of_uuids(database: str, empty_database: str) -> AsyncGenerator[Site, None]:
    async for made in site_of(database, empty_database, OF_UUIDS):
        yield made


async def test_an_empty_table_is_complete_and_leaves_nothing(site: Site) -> None:
    found = await site.discover()
    assert (found.rows, found.is_complete) == (0, True)
    assert (await site.state()).settled == LEAST


async def test_rows_are_counted_once_and_a_quiet_table_is_settled(site: Site) -> None:
    await site.writer.execute("insert into chat (session, text) select n % 7, n from generate_series(1, 100) n")
    found = await site.discover(sessions=3)
    assert (found.rows, found.created, found.is_complete) == (100, 7, True)
    assert (await site.discover()).rows == 0
    state = await site.state()
    assert (state.settled, len(state.seen), state.marks) == (100, 0, [])
    version = state.version
    await site.discover()
    assert (await site.state()).version == version, "a pass that finds nothing writes nothing"
    assert await site.agrees()


async def test_g18_a_row_committed_late_is_found_and_holds_the_watermark(site: Site) -> None:
    await site.writer.execute("begin; insert into chat (session, at, text) values ('late', '2001-01-01', 'I')")
    other = await asyncpg.connect(site.dsn)
    await other.execute("insert into chat (session, text) select 'on time', n from generate_series(1, 5) n")
    for _ in range(3):
        await site.discover()
    assert (await site.state()).settled == LEAST
    await site.writer.execute("commit")
    assert (await site.discover()).rows == 1
    await site.discover()
    assert (await site.state()).settled == 6
    assert await site.agrees()
    await other.close()


async def test_a_transaction_that_is_prepared_holds_the_watermark(site: Site) -> None:
    other = await asyncpg.connect(site.dsn)
    await site.writer.execute("begin; insert into chat (session, text) values ('late', 'I')")
    await other.execute("insert into chat (session, text) values ('on time', 'you')")
    await site.discover()  # marked while the transaction still has its first name
    await site.writer.execute("prepare transaction 'late'")
    for _ in range(3):
        await site.discover()
    assert (await site.state()).settled == LEAST
    await site.writer.execute("commit prepared 'late'")
    assert (await site.discover()).rows == 1
    assert await site.agrees()
    await other.close()


async def test_an_id_drawn_before_the_lock_is_waited_for(site: Site) -> None:
    drawn = await site.writer.fetchval("select nextval('chat_id_seq')")
    other = await asyncpg.connect(site.dsn)
    await other.execute("insert into chat (session, text) values ('on time', 'you')")
    for _ in range(3):
        await site.discover(grace_s=60)
    await site.writer.execute("insert into chat (id, session, text) values ($1, 'early', 'I')", drawn)
    assert (await site.discover(grace_s=60)).rows == 1
    assert await site.agrees()
    await other.close()


@pytest.mark.parametrize("start", ["start 1", "start 1000 restart", "start 1000 restart with 1"])
async def test_the_first_ids_of_a_session_that_keeps_some_are_waited_for(site: Site, start: str) -> None:
    await site.writer.execute(f"alter sequence chat_id_seq {start} cache 20")
    await site.writer.execute("begin; insert into chat (session, text) values ('early', 'I'); rollback")
    other = await asyncpg.connect(site.dsn)
    await other.execute("insert into chat (session, text) values ('on time', 'you')")
    await other.close()
    for _ in range(3):
        await site.discover()
    await site.writer.execute("insert into chat (session, text) values ('early', 'I')")
    assert (await site.discover()).rows == 1
    assert await site.agrees()


async def test_what_is_below_the_first_id_that_is_drawn_is_not_waited_for(site: Site) -> None:
    await site.writer.execute("alter sequence chat_id_seq start 1000 restart cache 20")
    await site.writer.execute("insert into chat (session, text) select n, n from generate_series(1, 9) n")
    for _ in range(3):
        await site.discover()
    assert (await site.state()).settled == 1008


async def test_a_table_that_lacks_its_first_ids_is_emptied_and_goes_on(site: Site) -> None:
    await site.writer.execute("alter sequence chat_id_seq cache 2")
    await site.writer.execute("insert into chat (session, text) select n, n from generate_series(1, 9) n")
    await site.writer.execute("delete from chat where id < 3")
    for _ in range(3):
        await site.discover()
    await site.writer.execute("truncate chat restart identity")
    for _ in range(3):
        await site.discover()
    await site.writer.execute("insert into chat (session, text) select 'after', n from generate_series(1, 9) n")
    assert (await site.discover()).rows == 9


@pytest.mark.parametrize("subscribed", [True, False])
async def test_ids_that_are_drawn_elsewhere_are_settled_in_the_end(
    site: Site, subscribed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another server, or by a program that sets them itself."""
    monkeypatch.setattr(serial, "_MOST_RANGES", 100)
    monkeypatch.setattr(serial, "_PATIENCE", 10)
    if subscribed:
        told = "insert into pg_subscription_rel values (1, 'chat'::regclass, 'r', null)"
        await site.writer.execute(f"set allow_system_table_mods = on; {told}")
    for part in range(4):
        rows = f"select {part} * 200 + 2 * n, n, 'I' from generate_series(1, 80) n"
        await site.writer.execute(f"insert into chat (id, session, text) {rows}")
        for _ in range(3):
            await site.discover()
    state = await site.state()
    assert len(state.seen) <= (11 if subscribed else 101)
    assert await site.agrees()


async def test_an_id_far_ahead_of_the_sequence_settles_nothing_below_it(site: Site) -> None:
    await site.writer.execute("insert into chat (id, session, text) values (1000000, 'by hand', 'I')")
    for _ in range(3):
        await site.discover()
    await site.writer.execute("insert into chat (session, text) values ('in order', 'you')")
    assert (await site.discover()).rows == 1
    assert await site.agrees()


@pytest.mark.parametrize("how", ["truncate chat restart identity", "delete from chat"])
async def test_a_table_that_is_emptied_goes_on(site: Site, how: str) -> None:
    await site.writer.execute("insert into chat (session, text) select n, n from generate_series(1, 9) n")
    for _ in range(2):
        await site.discover()
    await site.writer.execute(how)
    await site.discover()
    await site.writer.execute("insert into chat (session, text) values ('after', 'I')")
    assert (await site.discover()).rows == 1


async def test_a_pass_ends_in_time_and_the_next_goes_on(site: Site) -> None:
    await site.writer.execute("insert into chat (session, text) select n, n from generate_series(1, 2000) n")
    first = await site.discover(seconds=0.01, sessions=10)
    assert not first.is_complete
    passes = 1
    while not (await site.discover(seconds=0.01, sessions=10)).is_complete:
        passes += 1
    assert passes > 1
    assert await site.agrees()


async def test_a_conversation_of_very_many_messages_keeps_the_newest_keys(site: Site) -> None:
    await site.writer.execute("insert into chat (session, text) select 'long', n from generate_series(1, 20000) n")
    found = await site.discover()
    assert (found.rows, found.created) == (20000, 1)
    assert await site.agrees()


async def test_long_rows_are_read_in_small_pages(site: Site) -> None:
    await site.writer.execute(
        "insert into chat (session, text) select n, repeat('x', 250000) from generate_series(1, 60) n"
    )
    foreign = Foreign(site.theirs, site.shape)
    pages = [len(page.rows) async for page in foreign.pages([(LEAST, 2**63 - 1)])]
    assert sum(pages) == 60
    assert pages[1] == 8


async def test_rows_without_a_conversation_are_counted_by_reason(site: Site) -> None:
    await site.writer.execute("insert into chat (session, text) values (null, 'I'), (null, 'you'), ('s', 'we')")
    assert (await site.discover()).skipped == {"no_conversation": 2}
    assert (await site.state()).skipped == {"no_conversation": 2}


@pytest.mark.parametrize("statement", ["drop table chat", "alter table chat drop column text"])
async def test_a_table_that_vanishes_or_changes_raises_and_counts_nothing(site: Site, statement: str) -> None:
    await site.writer.execute("insert into chat (session, text) values ('s', 'I')")
    await site.discover()
    await site.writer.execute(statement)
    with pytest.raises((asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError)):
        await site.discover()


async def test_a_locked_table_is_not_waited_for(site: Site) -> None:
    await site.writer.execute("begin; lock table chat in access exclusive mode")
    async with asyncio.timeout(5):
        with pytest.raises(asyncpg.LockNotAvailableError):
            await site.discover()


async def test_a_pass_beside_the_deletion_of_the_index_counts_nothing(site: Site) -> None:
    await site.writer.execute("insert into chat (session, text) values ('s', 'I')")
    loaded = await site.state()
    async with site.pool.acquire() as connection, connection.transaction():
        await connection.execute(
            "delete from conversation_source_state; update conversation_index set is_there = false"
        )
    async with site.pool.acquire() as connection:
        with pytest.raises(source_state.Outrun):
            await source_state.swap(connection, "plain", loaded, rows=1, skipped={})
    with pytest.raises(Conflict):
        await site.discover()
    await site.pool.execute("update conversation_index set is_there = true")
    assert (await site.discover()).rows == 1
    with pytest.raises(source_state.Outrun):
        async with site.pool.acquire() as connection:
            await source_state.swap(connection, "plain", loaded, rows=1, skipped={})


_STOCK = """
create table n8n_chat_histories (
    id serial primary key, session_id varchar(255) not null, message jsonb not null);
create table litellm_spend_logs (
    request_id text primary key, session_id text, "startTime" timestamp, "endTime" timestamp, model text,
    call_type text, total_tokens int);
create index on litellm_spend_logs ("startTime");
insert into n8n_chat_histories (session_id, message)
    select n, jsonb_build_object('type', 'human', 'content', n) from generate_series(1, 20000) n;
delete from n8n_chat_histories where id % 100 = 0;
insert into litellm_spend_logs (request_id, session_id, "startTime")
    select n, n, '2026-01-01'::timestamp + n * interval '1 s' from generate_series(1, 20000) n;
analyze
"""


async def test_pages_of_stock_tables_descend_the_index_once_per_gap(site: Site) -> None:
    """The key of n8n's table is narrower than what is read of it."""
    from app.conversations.foreign import _PAGE

    await site.writer.execute(_STOCK)
    serial = await recognise(site.theirs, Source("n8n", "env:NONE", "n8n_chat_histories"))
    timed = await recognise(site.theirs, Source("litellm", "env:NONE", "litellm_spend_logs"))
    page = _PAGE.format(reads=", ".join(serial.reads), table=serial.table, key=serial.key.column)
    for sql, given, index in (
        (page, ([5, 19000], [7, 2**63 - 1], 200), "n8n_chat_histories_pkey"),
        (newest_first(serial), (50,), "n8n_chat_histories_pkey"),
        (newest_first(timed), (50,), "litellm_spend_logs_startTime_idx"),
    ):
        plan = "\n".join(row[0] for row in await site.theirs.fetch(f"explain {sql}", *given))
        assert index in plan, plan
        assert "Sort" not in plan, plan
        assert "Seq Scan" not in plan, plan


async def test_a_sweep_reads_what_was_committed_until_its_look(of_uuids: Site) -> None:
    class Interrupted(Foreign):
        async def look(self) -> Look:
            await of_uuids.writer.execute("insert into chat (session, text) values ('meanwhile', 'I')")
            await alone(of_uuids.theirs)
            return await super().look()

    engine = Discovery(of_uuids.pool, Bounds(grace_s=0))
    await engine.discover("plain", Interrupted(of_uuids.theirs, of_uuids.shape))
    await of_uuids.discover()
    assert await of_uuids.agrees()


@pytest.mark.parametrize("reading", [1, 2, 3])
async def test_a_table_that_is_rewritten_while_it_is_swept_is_read_whole(
    of_uuids: Site, reading: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the sweep begins, between two of its batches, and in one: rows lie elsewhere afterwards."""
    monkeypatch.setattr("app.conversations.foreign._PIECE", 20)

    class Interrupted(Foreign):
        count = 0

        async def look(self) -> Look:
            await self.rewritten(reading == 1)
            return await super().look()

        async def swept(self, extent: Extent) -> AsyncGenerator[Swept, None]:
            self.count += 1
            await self.rewritten(reading == self.count == 2)
            async with aclosing(super().swept(extent)) as pages:
                async for page in pages:
                    yield page
                    await self.rewritten(reading == 3 and not page.rows)  # between two pieces of it

        async def rewritten(self, now: bool) -> None:
            if now and not rewritings:
                rewritings.append(self.count)
                await of_uuids.writer.execute("vacuum full chat")

    rewritings: list[int] = []
    rows = "select n, repeat('x', 500) from generate_series(1, 3000) n"
    await of_uuids.writer.execute(f"insert into chat (session, text) {rows}")
    await of_uuids.writer.execute("delete from chat where session::int <= 1000")
    await alone(of_uuids.theirs)
    engine = Discovery(of_uuids.pool, Bounds(grace_s=0, rows=700))
    assert (await engine.discover("plain", Interrupted(of_uuids.theirs, of_uuids.shape))).is_complete
    assert rewritings
    assert await of_uuids.agrees()


async def test_without_serial_keys_a_late_row_is_found_and_a_changed_one_is_no_new_one(of_uuids: Site) -> None:
    site = of_uuids
    await site.writer.execute("insert into chat (session, text) select n % 5, n from generate_series(1, 300) n")
    other = await asyncpg.connect(site.dsn)
    await other.execute("begin; savepoint s; insert into chat (session, at, text) values ('late', '2001-01-01', 'I')")
    assert (await site.discover(sessions=2)).rows == 300
    await site.writer.execute("update chat set n = 1")
    assert (await site.discover()).rows == 0
    await other.execute("commit")
    assert (await site.discover()).rows == 1
    assert (await site.discover()).rows == 0
    assert await site.agrees()
    await other.close()


async def test_a_sweep_goes_on_where_it_was_and_begins_again_where_the_table_was_rewritten(of_uuids: Site) -> None:
    site = of_uuids
    await site.writer.execute("insert into chat (session, text) select n, n from generate_series(1, 1000) n")
    assert not (await site.discover(seconds=0.001, sessions=10)).is_complete
    assert (await site.state()).sweep["place"] != "(0,0)"
    await site.writer.execute("vacuum full chat")
    while not (await site.discover(sessions=100)).is_complete:
        pass
    assert await site.agrees()


async def test_an_indexed_time_saves_reading_the_whole_table(of_uuids: Site) -> None:
    from app.conversations.sources.shape import Time

    site = of_uuids
    site.shape = replace(OF_UUIDS, time=Time('"at"', '"at"', "began", True))
    await site.writer.execute("insert into chat (session, text) select n, n from generate_series(1, 50) n")
    await site.discover()
    await site.writer.execute("insert into chat (session, text) values ('new', 'I'), ('new', 'you')")
    old = UUID(int=7)
    await site.writer.execute("insert into chat (id, session, at, text) values ($1, 'old', '2001-01-01', 'I')", old)
    assert (await site.discover()).rows == 2
    sweep = (await site.state()).sweep
    assert not sweep["is_whole"]
    # A day later the whole table is read, and finds what the time had hidden.
    state = replace(await site.state(), sweep={**sweep, "day_at": sweep["day_at"] - 90_000})
    async with site.pool.acquire() as connection, connection.transaction():
        await source_state.swap(connection, "plain", state, rows=0, skipped={})
    assert (await site.discover()).rows == 1
    assert await site.agrees()
