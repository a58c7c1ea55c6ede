"""The job over all sources, the command and the status: one that fails stops no other, and operators are told."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import asyncpg
import pytest
from structlog.testing import capture_logs

from app.access.audit import Actor
from app.conversations import upkeep
from app.conversations.batch import Bounds
from app.conversations.passes import Passes
from app.conversations.sources.source import Source, apply_sources
from app.jobs.schedule import SCHEDULE, discovery_cron
from app.postgres import open_pool
from app.settings import load
from app.telemetry import Metrics
from tests import command
from tests.house import Open

_TABLE = "create table {} (id serial primary key, session_id varchar(255) not null, message jsonb not null)"
_ROWS = """
insert into {} (session_id, message)
select 's' || n % $1, '{{"type": "human", "content": "Why?", "additional_kwargs": {{}}, "response_metadata": {{}}}}'
from generate_series(1, $2::int) n
"""


@asynccontextmanager
async def passes_of(database: str) -> AsyncGenerator[Passes, None]:
    pool = await open_pool(database, 6)
    try:
        yield Passes(pool=pool, bounds=Bounds(grace_s=0), metrics=Metrics(), failing=set())
    finally:
        await pool.close()


@pytest.fixture
async def writer(database: str, empty_database: str, tmp_path: Path) -> AsyncGenerator[asyncpg.Connection, None]:
    """Of two tables with 30 and 1,000 conversations; the sources `one`, `two` and `gone`, which has no table."""
    (tmp_path / "dsn").write_text(empty_database)
    writer, ours = await asyncpg.connect(empty_database), await asyncpg.connect(database)
    for name, conversations in (("one", 30), ("two", 1000)):
        await writer.execute(_TABLE.format(name))
        await writer.execute(_ROWS.format(name), conversations, 2000)
    dsn = f"file:{tmp_path / 'dsn'}"
    sources = [Source(name, dsn, name, code=name, client=client) for name, client in (("one", "acme"), ("two", ""))]
    await apply_sources(ours, [*sources, Source("gone", dsn, "gone", code="gone")])
    await ours.close()
    yield writer
    await writer.close()


async def test_a_source_that_fails_stops_no_other_and_is_told_of(database: str, writer: asyncpg.Connection) -> None:
    async with passes_of(database) as passes:
        with capture_logs() as logs:
            assert await passes.run_once() == 4000
        done = {line["source"]: line for line in logs if line["event"] == "discovery_done"}
        assert {name: (line["new"], line["skipped"], line["errors"]) for name, line in done.items()} == {
            "one": (30, 0, 0),
            "two": (1000, 0, 0),
        }
        failed = [line for line in logs if line["event"] == "discovery_failed"]
        assert [(line["source"], line["code"]) for line in failed] == [("gone", "source_table")]
        for _ in range(3):
            assert passes.failing == set()
            await passes.run_once()
        assert passes.failing == {"source gone"}
        value = passes.metrics.registry.get_sample_value
        assert value("parley_discovery_conversations", {"source": "one", "client": "acme"}) == 30
        assert value("parley_discovery_rows_total", {"source": "two"}) == 2000
        assert value("parley_discovery_created_total", {"source": "two"}) == 1000
        assert value("parley_discovery_failures", {"source": "gone"}) == 4
        assert value("parley_discovery_error_ratio", {"source": "gone"}) == 1
        row = await passes.pool.fetchrow("select * from crew_discovery_state where crew_code = 'two'")
        assert row is not None
        assert (row["conversation_count"], row["consecutive_failures"], row["watermark"]) == (1000, 0, 2000)
        assert row["last_discovered_at"] is not None
        await writer.execute(_TABLE.format("gone"))
        await passes.run_once()
        assert passes.failing == set()


async def test_d16_one_works_on_a_source_and_a_killed_one_frees_it(database: str, writer: asyncpg.Connection) -> None:
    async with passes_of(database) as passes, passes_of(database) as other:
        source = Source("one", f"file:{'/nowhere'}", "one")
        async with passes.turn("one", alone=True) as is_mine:
            assert is_mine
            assert (await other.run(source)).is_busy
            assert (await other.run(source, alone=False)).error_code == "reference_missing"
            await other.pool.execute(
                "select pg_terminate_backend(pid) from pg_locks where locktype = 'advisory' and pid <> pg_backend_pid()"
            )
            async with asyncio.timeout(5):
                while (await other.run(source)).is_busy:
                    pass


async def test_passes_that_are_asked_for_meanwhile_are_one(database: str, writer: asyncpg.Connection) -> None:
    async with passes_of(database) as passes:
        async with passes.pool.acquire() as connection:
            from app.conversations.sources.source import all_sources

            (source,) = [one for one in await all_sources(connection) if one.id == "one"]
        results = await asyncio.gather(*(passes.at_once(source, seconds=5) for _ in range(50)))
        assert {result.error_code for result in results} == {None}
        assert await passes.pool.fetchval("select passes from conversation_source_state where source = 'one'") <= 2


async def test_a_deleted_index_is_left_alone(database: str, writer: asyncpg.Connection) -> None:
    async with passes_of(database) as passes:
        await passes.pool.execute("update conversation_index set is_there = false")
        assert await passes.run_once() == 0


async def test_the_command_reads_to_the_end_and_exits_with_what_failed(
    database: str, writer: asyncpg.Connection
) -> None:
    one = await command.run("discover", "--client", "acme", DATABASE_URL=database)
    assert (one.code, one.out) == (0, ["one: 2,000 rows, 30 new conversations, 0 rows skipped"]), one.err
    every = await command.run("discover", DATABASE_URL=database)
    assert every.code == 1
    assert "two: 2,000 rows, 1,000 new conversations, 0 rows skipped" in every.out
    assert any(line.startswith("gone: 0 rows") and "There is no table gone" in line for line in every.out)
    assert (await command.run("discover", "three", DATABASE_URL=database)).code == 2


async def test_the_status_tells_of_every_source(house: Open, writer: asyncpg.Connection) -> None:
    async with house() as home:
        async with asyncio.timeout(20):
            while True:
                status = (await home.client.get("/api/discovery/status")).json()
                if all(source["lastRun"] for source in status["sources"]) and status["nextRun"]:
                    break
                await asyncio.sleep(0.05)
        assert status["cron"] == SCHEDULE["discovery"]
        gone, one, two = status["sources"]
        assert (gone["error"]["code"], gone["consecutiveFailures"]) == ("source_table", 1)
        assert (one["conversations"], one["client"], one["error"], one["rows"]) == (30, "acme", None, 2000)
        assert two["lagSeconds"] < 60
        assert (status["chats"]["drift"], one["drift"]) == (0, 0)


def test_a_schedule_that_cannot_be_read_is_the_default() -> None:
    assert discovery_cron(load(discovery_cron="1 2 * * *")) == "1 2 * * *"
    for wrong in ("often", "99 * * * *", "0 0 30 2 *", ""):
        assert discovery_cron(load(discovery_cron=wrong)) == SCHEDULE["discovery"]


async def test_a_sync_passes_over_each_and_brings_all_back_after_a_delete(
    database: str, writer: asyncpg.Connection
) -> None:
    async with passes_of(database) as passes, upkeep.alone(database) as own:
        for _ in range(2):
            synced = await upkeep.sync(own, discover=partial(upkeep.each_source, passes))
            assert (synced.messages, synced.failures) == (4000, 1)
            assert [(failed.source, failed.id) for failed in synced.failed] == [("gone", "")]
            assert (await upkeep.stats(own)).sources == {"one": 30, "two": 1000}
            reset = await upkeep.reset(own, Actor("command:test"))
            assert reset.sources == {"one": 30, "two": 1000}
            # Both know what was counted: nothing is counted twice, on no day either.
            assert (await upkeep.sync(own, discover=partial(upkeep.each_source, passes))).messages == 0
            assert await own.fetchval("select sum(messages) from conversation_days") == 4000
            assert await own.fetchval("select sum(message_count) from conversations") == 4000
            assert await upkeep.delete(own, Actor("command:test"))
            assert await upkeep.init(own)
