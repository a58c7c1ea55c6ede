"""Drift that was planted by hand is found, counted and put right; what writers do meanwhile is no drift."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from random import Random
from time import monotonic

import asyncpg
import pytest
from structlog.testing import capture_logs

from app.conversations import rounds
from app.conversations.batch import Bounds
from app.conversations.discovery import Discovery
from app.conversations.foreign import Foreign
from app.conversations.foreign_drift import ForeignDrift
from app.conversations.index import OWN, Chat, put_total_right
from app.conversations.own_drift import own_piece
from app.conversations.passes import Passes
from app.conversations.reconcile import Reconcile
from app.conversations.rounds import Piece, Place
from app.conversations.sources.source import Source, apply_sources
from app.postgres import Pool, open_pool
from app.telemetry import Metrics
from tests import command
from tests.conversations.counted import agreed
from tests.conversations.plain import (
    BY_SESSION,
    MADE,
    MADE_OF_UUIDS,
    OF_UUIDS,
    SCANNED,
    Plain,
    alone,
    as_indexed,
    indexed,
    recounted,
)
from tests.conversations.savers import Saver
from tests.conversations.storm import Kind, Storm
from tests.house import Open
from tests.sync.test_gateway import add, delete, put, sync

_CHATS = [Chat(user, f"{user}{number}", "shop") for user in ("ann", "bob") for number in range(3)]


@asynccontextmanager
async def pool_of(dsn: str) -> AsyncGenerator[Pool, None]:
    pool = await open_pool(dsn, 4)
    try:
        yield pool
    finally:
        await pool.close()


async def own_round(pool: Pool, *, until: float = 0) -> Piece:
    """All pieces of a round together; each is as short as it may be."""
    place: Place | None = {}
    compared = drift = unsure = 0
    while place is not None:
        piece = await own_piece(pool, place, until=until)
        place, compared = piece.place, compared + piece.compared
        drift, unsure = drift + piece.drift, unsure + piece.unsure
    return Piece(None, compared, drift, unsure)


async def test_own_drift_is_found_counted_and_put_right(database: str) -> None:
    async with pool_of(database) as pool, pool.acquire() as connection:
        saver = Saver(connection, Random(1))  # type: ignore[arg-type]
        for chat in _CHATS:
            await saver.save(chat)
        assert await own_round(pool) == Piece(None, 6, 0)
        for spoil in (
            "with gone as (delete from conversations where conversation_id = 'ann0' returning id) "
            "delete from conversation_words using gone where conversation = gone.id",
            "update conversations set message_count = 7 where conversation_id = 'ann1'",
            "insert into messages (id, chat_id, user_id, role, content, position) values "
            "('behind', 'ann2', 'ann', 'user', 'So?', 99)",
            "delete from conversation_words where conversation = (select id from conversations "
            "where conversation_id = 'bob0')",
            "update conversations set total_tokens = total_tokens + 1 where conversation_id = 'bob1'",
            "insert into conversations (source, username, conversation_id, first_message_at, last_message_at, "
            "time_source, message_count, total_tokens) values ('parley', 'eve', 'x', now(), now(), 'message', 1, 1)",
        ):
            await connection.execute(spoil)
        assert await own_round(pool) == Piece(None, 6, 6)
        assert await own_round(pool) == Piece(None, 6, 0), "what is right is left alone"
        await connection.execute(
            "insert into conversation_counts values ('parley', 0, 5) on conflict (source, slot) "
            "do update set conversations = conversation_counts.conversations + 5"
        )
        assert await put_total_right(connection, OWN)
        assert not await put_total_right(connection, OWN)
        # What was planted was said on no day.
        day = "select min(ctid) from conversation_days where username = 'ann'"
        await connection.execute(f"update conversation_days set messages = messages + 1 where ctid in ({day})")
        rows = {row["conversation_id"]: row for row in await agreed(connection)}  # type: ignore[arg-type]
        assert set(rows) == {chat.id for chat in _CHATS}
        assert (rows["ann2"]["count"], rows["ann2"]["last_question"]) == (3, "So?")


async def test_messages_that_are_saved_meanwhile_are_no_drift(database: str) -> None:
    async with AsyncExitStack() as stack:
        pool = await stack.enter_async_context(pool_of(database))
        opened = [await asyncpg.connect(database) for _ in range(4)]
        for connection in opened:
            stack.push_async_callback(connection.close)
        done = asyncio.Event()

        async def run(connection: asyncpg.Connection, chance: Random) -> None:
            saver = Saver(connection, chance)
            while not done.is_set():
                await saver.save(chance.choice(_CHATS))

        async with asyncio.TaskGroup() as tasks:
            for number, connection in enumerate(opened):
                tasks.create_task(run(connection, Random(number)))
            found = [await own_round(pool)]
            while len(found) < 30 or found[-1].compared < len(_CHATS):
                found.append(await own_round(pool))
            done.set()
        assert {(piece.drift, piece.unsure) for piece in found} == {(0, 0)}


async def test_whatever_devices_do_is_no_drift(house: Open, database: str) -> None:
    async with house(enable_background_jobs=False) as home, pool_of(database) as pool:
        pushes = [
            [put("c"), add("m1", "c", "Where?")],
            [add("m2", "c", "There.", role="assistant")],
            [add("m3", "d", "Only an answer.", role="assistant")],
            [add("m4", "c", "No.", status="failed")],
            [add("m4", "c", "No.", status="complete"), delete("d", 5)],
            [{"op": "msg.del", "id": "m1"}, put("e"), delete("e", 9)],
        ]
        for number, ops in enumerate(pushes, 1):
            await sync(home.client, "phone", ops, first=number, failed=True)
            assert (await own_round(pool)).drift == 0, ops
        await home.ask(session_id="c")
        await home.ask(session_id="f")
        assert (await own_round(pool)).drift == 0


# -- tables of others

SHAPES = {"keys": Plain(), "scanned": SCANNED, "sessions": BY_SESSION, "uuids": OF_UUIDS}
_ROWS = "insert into chat (session, text) select 's' || n % 40, 'What of ' || n || '?' from generate_series(1, 400) n"
_EARLY = "insert into chat (id, session, text) values ($1, $2, 'Behind your back?')"


class Site:
    """A table of theirs that was discovered, and one connection to it that writes."""

    def __init__(self, pool: Pool, theirs: asyncpg.Connection, reader: asyncpg.Connection, shape: Plain) -> None:
        self.pool, self.theirs, self.shape = pool, theirs, shape
        self.foreign = Foreign(reader, shape)

    async def discover(self) -> int:
        engine, rows = Discovery(self.pool, Bounds(grace_s=0, standby_grace_s=0)), 0
        for _ in range(2):
            rows += (await engine.discover("plain", self.foreign)).rows
        return rows

    async def compared(self) -> Piece:
        place: Place | None = {}
        compared = drift = unsure = 0
        while place is not None:
            piece = await ForeignDrift(self.pool, "plain", self.foreign).piece(place, until=0)
            assert piece.place != place, "it goes on"
            place, compared = piece.place, compared + piece.compared
            drift, unsure = drift + piece.drift, unsure + piece.unsure
        return Piece(None, compared, drift, unsure)

    async def agrees(self) -> bool:
        async with self.pool.acquire() as ours:
            there = await indexed(ours)  # type: ignore[arg-type]
            total = await ours.fetchval("select sum(conversations) from conversation_counts where source = 'plain'")
        return total == len(there) and there == as_indexed(await recounted(self.theirs, self.shape))


@asynccontextmanager
async def site_of(database: str, theirs: str, shape: Plain) -> AsyncGenerator[Site, None]:
    async with pool_of(database) as pool, AsyncExitStack() as stack:
        writer, reader = await asyncpg.connect(theirs), await asyncpg.connect(theirs)
        stack.push_async_callback(writer.close)
        stack.push_async_callback(reader.close)
        await reader.execute("set default_transaction_read_only = on")
        await writer.execute(MADE if shape.key.is_serial else MADE_OF_UUIDS)
        yield Site(pool, writer, reader, shape)


@pytest.mark.parametrize("kind", list(SHAPES))
async def test_drift_of_a_table_is_found_counted_and_put_right(database: str, empty_database: str, kind: str) -> None:
    async with site_of(database, empty_database, SHAPES[kind]) as site:
        is_serial = site.shape.key.is_serial
        await site.theirs.execute(_ROWS)
        if is_serial:
            await site.theirs.execute("delete from chat where id in (3, 5)")
        await alone(site.theirs)
        await site.discover()
        assert await site.agrees()
        assert await site.compared() == Piece(None, 40, 0)
        await site.pool.execute("delete from conversations where conversation_id = 's1'")
        await site.pool.execute("update conversations set message_count = 3 where conversation_id = 's2'")
        await site.theirs.execute("delete from chat where session = 's4' and text like '%4?'")
        await site.theirs.execute("delete from chat where session = 's6'")
        await site.theirs.execute("update chat set text = 'Changed?' where session = 's7'")
        planted = 5
        if is_serial:
            await site.theirs.execute(_EARLY, 3, "s8")
            await site.theirs.execute(_EARLY, 5, "new")
            planted += 2
        assert await site.discover() == 0, "discovery sees nothing of it"
        assert not await site.agrees()
        found = await site.compared()
        if site.shape.session is None:
            # Rows are put back as they are found, page by page, and not a conversation at once.
            assert (found.compared, found.unsure) == (39, 0)
            assert found.drift >= planted
        else:
            assert found == Piece(None, 39, planted)
        assert (await site.compared()).drift == 0
        assert await put_total_right(site.pool, "plain")
        assert await site.agrees()


async def test_rows_that_discovery_has_yet_to_read_are_no_drift(database: str, empty_database: str) -> None:
    for kind in ("scanned", "uuids"):
        async with site_of(database, empty_database, SHAPES[kind]) as site:
            await site.theirs.execute(_ROWS)
            await site.discover()
            await site.theirs.execute("insert into chat (session, text) values ('s1', 'New?'), ('later', 'New?')")
            assert await site.compared() == Piece(None, 40, 0)
            assert await site.discover() == 2
            assert await site.compared() == Piece(None, 41, 0)
            assert await site.agrees()
            await site.theirs.execute("drop table chat")
            await site.pool.execute("delete from conversation_source_state; delete from conversations")
            await site.pool.execute("delete from conversation_counts")


@pytest.mark.parametrize("kind", ["keys", "sessions"])
async def test_what_is_above_the_watermark_is_compared_too(database: str, empty_database: str, kind: str) -> None:
    async with site_of(database, empty_database, SHAPES[kind]) as site:
        late = await asyncpg.connect(empty_database)
        await late.execute("begin; insert into chat (session, text) values ('late', 'I')")
        await site.theirs.execute("insert into chat (session, text) select 's' || n, n from generate_series(1, 9) n")
        assert await site.discover() == 9
        await site.pool.execute("delete from conversations where conversation_id = 's1'")
        await late.execute("commit")
        await late.close()
        assert (await site.compared()).drift == 1, "and the late one is discovery's"
        assert await site.discover() == 1
        assert await site.pool.fetchval("select sum(message_count) from conversations") == 10


async def test_a_conversation_of_more_rows_than_keys_are_kept_is_compared(database: str, empty_database: str) -> None:
    async with site_of(database, empty_database, SCANNED) as site:
        await site.theirs.execute("insert into chat (session, text) select 'long', n from generate_series(1, 3000) n")
        await site.discover()
        assert await site.compared() == Piece(None, 1, 0)
        await site.theirs.execute("delete from chat where id % 2 = 0")
        assert await site.compared() == Piece(None, 1, 1)
        assert await site.agrees()


async def test_where_only_keys_find_rows_a_long_conversation_is_said_to_be_unsure(
    database: str, empty_database: str
) -> None:
    async with site_of(database, empty_database, Plain()) as site:
        await site.theirs.execute("insert into chat (session, text) select 'long', n from generate_series(1, 300) n")
        await site.discover()
        assert await site.compared() == Piece(None, 1, 0, 1)


@pytest.mark.parametrize(
    ("seed", "kind", "shape"), [(4, "serial", "sessions"), (5, "cached", "scanned"), (6, "uuids", "uuids")]
)
async def test_a_storm_of_writers_is_no_drift(
    database: str, empty_database: str, seed: int, kind: Kind, shape: str
) -> None:
    storm = Storm(database, empty_database, seed, kind, special=SHAPES[shape], is_compared=True)
    await storm.rage()
    assert await storm.agrees()
    assert storm.compared
    assert storm.drift == 0


# -- the job


_TABLE = "create table log (id serial primary key, session_id varchar(255) not null, message jsonb not null)"
_SAID = """
insert into log (session_id, message)
select 's' || n % 30, '{"type": "human", "content": "Why?", "additional_kwargs": {}, "response_metadata": {}}'
from generate_series(1, 300) n
"""


@asynccontextmanager
async def job_of(database: str) -> AsyncGenerator[Reconcile, None]:
    async with pool_of(database) as pool:
        passes = Passes(pool=pool, bounds=Bounds(grace_s=0), metrics=Metrics(), failing=set())
        yield Reconcile(pool=pool, passes=passes, metrics=passes.metrics)


@pytest.fixture
async def theirs(database: str, empty_database: str, tmp_path: Path) -> AsyncGenerator[asyncpg.Connection, None]:
    """A table that is the source `log`, discovered; the source `gone` has none."""
    (tmp_path / "dsn").write_text(empty_database)
    writer, ours = await asyncpg.connect(empty_database), await asyncpg.connect(database)
    await writer.execute(_TABLE)
    await writer.execute(_SAID)
    dsn = f"file:{tmp_path / 'dsn'}"
    await apply_sources(ours, [Source("log", dsn, "log", code="log"), Source("gone", dsn, "gone", code="gone")])
    await ours.close()
    yield writer
    await writer.close()


async def test_the_job_goes_on_where_it_stopped_and_rests_when_it_is_through(
    database: str, theirs: asyncpg.Connection
) -> None:
    async with job_of(database) as job:
        async with job.pool.acquire() as connection:
            for number in range(450):
                await connection.execute(
                    "insert into chats (id, user_id, title) values ($1, 'ann', '')", f"c{number:04}"
                )
        for _ in range(2):
            await job.passes.run_once()
        await theirs.execute("delete from log where session_id = 's3'")
        job.piece_s = 0
        with capture_logs() as logs:
            first = await job.run_once()
            told = await rounds.rounds(job.pool)
            assert (first, told[OWN].compared, told["log"].compared) == (230, 200, 30)
            assert told[OWN].place == {"walk": "chats", "after": ["ann", "c0199"]}
            assert told["gone"].error_code == "source_table"
            while not ((told := await rounds.rounds(job.pool))[OWN].ended_at and told["log"].ended_at):
                await job.run_once()
        assert (told[OWN].compared, told[OWN].drift, told["log"].compared, told["log"].drift) == (450, 0, 30, 1)
        drift = [line for line in logs if line["event"] == "index_drift"]
        assert [(line["source"], line["conversations"]) for line in drift] == [("log", 1)]
        assert {line["source"] for line in logs if line["event"] == "reconcile_failed"} == {"gone"}
        assert await job.run_once() == 0, "what was compared lately rests"
        await job.tell()
        value = job.metrics.registry.get_sample_value
        assert value("parley_index_drift", {"source": "log"}) == 1
        assert value("parley_reconcile_drift_total", {"source": "log"}) == 1
        assert value("parley_reconcile_compared_total", {"source": OWN}) == 450
        row = await job.pool.fetchrow("select drift, reconciled_at from crew_discovery_state where source = 'log'")
        assert row is not None
        assert row["drift"] == 1
        assert row["reconciled_at"] is not None
        await job.pool.execute("update conversation_rounds set ended_at = ended_at - interval '13 hours'")
        assert await job.run_once() > 0


async def test_d16_two_replicas_at_once_and_one_that_is_killed(database: str, theirs: asyncpg.Connection) -> None:
    async with job_of(database) as job, job_of(database) as other:
        sources = await job.sources()
        async with job.passes.turn("log", alone=True):
            assert await other.run("log", sources["log"], until=monotonic()) is None
            await other.pool.execute(
                "select pg_terminate_backend(pid) from pg_locks where locktype = 'advisory' and pid <> pg_backend_pid()"
            )
            async with asyncio.timeout(5):
                while await other.run("log", sources["log"], until=monotonic()) is None:
                    pass


async def test_a_table_that_vanishes_and_a_database_that_is_away_take_nothing_away(
    database: str, theirs: asyncpg.Connection, tmp_path: Path
) -> None:
    async with job_of(database) as job:
        await job.passes.run_once()
        (tmp_path / "dsn").write_text("postgresql://nobody@127.0.0.1:1/x")
        source = (await job.sources())["log"]
        assert await job.run("log", source, until=monotonic()) is None
        assert (await rounds.rounds(job.pool))["log"].error_code == "source_database"
        assert await job.pool.fetchval("select count(*) from conversations") == 30
        assert await job.pool.fetchval("select error_code from conversation_source_state where source = 'log'") is None


async def test_a_deleted_index_is_left_alone(database: str) -> None:
    async with job_of(database) as job:
        await job.pool.execute("update conversation_index set is_there = false")
        assert await job.run_once() == 0
        assert await rounds.rounds(job.pool) == {}
        # Nor where it is deleted between two pieces, or by hand.
        assert await job.run(OWN, None, until=monotonic()) is None
        assert (await rounds.rounds(job.pool))[OWN].error_code == "index_missing"


async def test_the_command_runs_whole_rounds(database: str, theirs: asyncpg.Connection) -> None:
    async with job_of(database) as job:
        for _ in range(2):
            await job.passes.run_once()
        await job.pool.execute("update conversations set message_count = 1 where conversation_id = 's5'")
    one = await command.run("index", "reconcile", "log", DATABASE_URL=database)
    assert (one.code, one.out[-1]) == (0, "log: 30 conversations compared, 1 put right"), one.err
    every = await command.run("index", "reconcile", DATABASE_URL=database)
    assert every.code == 1
    assert "parley: 0 conversations compared, 0 put right" in every.out
    assert any(line.startswith("gone: There is no table gone") for line in every.out)
    assert (await command.run("index", "reconcile", "none", DATABASE_URL=database)).code == 2
