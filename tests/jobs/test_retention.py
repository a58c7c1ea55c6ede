"""What goes after a time, and what must not."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from structlog.testing import capture_logs

from app.chats.decoders import Decoders
from app.chats.images import Images, images_expiring
from app.chats.picture import Limits
from app.errors import Gone
from app.expiry import Rows, estimate
from app.flows.chatbots import Chatbots
from app.flows.queue import _OLD
from app.flows.sessions import _EXPIRED, Sessions
from app.jobs.cleaning import clean_up, look_ahead
from app.jobs.retention import Retention
from app.jobs.schedule import expiring
from app.postgres import Pool, open_pool
from app.schema import migrate
from app.settings import load
from app.streams.partitions import Partitions, first_id
from app.streams.retention import _UNFINISHED, Events
from app.streams.tail import State
from app.wall import Wall
from tests.house import Open
from tests.migrating import migrate_to
from tests.serving import client_of
from tests.streams.engine import Engine, engine

DAY_S = 86400.0
ERRORS = Rows("error_logs", "created_at", 90 * DAY_S)


@pytest.fixture
async def pool(database: str) -> AsyncGenerator[Pool, None]:
    pool = await open_pool(database, 5)
    yield pool
    await pool.close()


async def add_errors(pool: Pool, count: int, *, days: float) -> None:
    await pool.execute(
        "insert into error_logs (id, category, code, message, created_at)"
        " select gen_random_uuid(), 'x', 'x', 'x', now() - make_interval(secs => $2) from generate_series(1, $1)",
        count,
        days * DAY_S,
    )


async def count(pool: Pool, table: str) -> int:
    number: int = await pool.fetchval(f"select count(*) from {table}")
    return number


# -- rows


async def test_rows_go_when_they_are_old_in_pieces(pool: Pool) -> None:
    await add_errors(pool, 25, days=91)
    await add_errors(pool, 5, days=89)
    found = await ERRORS.expired(pool, 1000)
    assert found.rows == 25
    assert found.late_s == pytest.approx(DAY_S, abs=60)
    assert (await ERRORS.expired(pool, 10)).rows == 10
    assert [await ERRORS.clean(pool, 10) for _ in range(4)] == [10, 10, 5, 0]
    assert await count(pool, "error_logs") == 5


async def test_two_passes_at_once_share_the_work(pool: Pool) -> None:
    await add_errors(pool, 2000, days=100)
    passes = [Retention(pool, [ERRORS], piece=50).run_once() for _ in range(3)]
    assert sum(await asyncio.gather(*passes)) == 2000


async def test_a_pass_ends_when_its_time_is_up(pool: Pool) -> None:
    await add_errors(pool, 100, days=100)
    assert await Retention(pool, [ERRORS], piece=10, pass_s=0).run_once() == 0
    assert await Retention(pool, [ERRORS], piece=10, pass_s=0.03).run_once() < 100


async def test_the_clock_is_the_database_s(pool: Pool, database: str) -> None:
    await add_errors(pool, 3, days=0)
    assert await ERRORS.clean(pool, 10) == 0
    name = database.partition("?")[0].rpartition("/")[2]
    await pool.execute(f"alter database {name} set parley.now = '{datetime.now(UTC) + timedelta(days=91)}'")
    later = await open_pool(database, 1)
    assert await ERRORS.clean(later, 10) == 3
    await later.close()


@pytest.mark.parametrize("table", ["error_logs", "conversation_processing_metrics", "idempotency_keys", "images"])
async def test_old_rows_are_found_by_an_index(pool: Pool, database: str, table: str) -> None:
    settings = load(database_url=database)
    rows = next(one for one in expiring(settings, chatbots=Chatbots(pool)) if one.table == table)
    assert isinstance(rows, Rows)
    query = f"select ctid from {table} where {rows.age} < now() and {rows.only} order by {rows.age} limit 10"
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute("set local enable_seqscan = off")
        plan = "\n".join(row[0] for row in await connection.fetch(f"explain {query}"))
    assert "Index Scan" in plan
    assert "Sort" not in plan


@pytest.mark.parametrize(
    ("query", "index", "values"),
    [
        (_EXPIRED, "conversation_sessions_idle", ("c", 1.0, 10)),
        (_OLD, "queued_messages_age", (1.0, 10)),
        (_UNFINISHED, "streaming_sessions_unfinished", (uuid4(), uuid4())),
    ],
)
async def test_others_are_found_by_an_index(pool: Pool, query: str, index: str, values: tuple[object, ...]) -> None:
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute("set local enable_seqscan = off")
        plan = "\n".join(row[0] for row in await connection.fetch(f"explain {query}", *values))
    assert index in plan
    assert "Sort" not in plan


async def test_ended_streams_are_found_by_an_index(pool: Pool) -> None:
    query = "select ctid from streaming_sessions where ended_at < now() and ended_at is not null order by ended_at"
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute("set local enable_seqscan = off")
        plan = "\n".join(row[0] for row in await connection.fetch(f"explain {query} limit 10"))
    assert "streaming_sessions_ended" in plan


# -- a first, huge clean-up


async def test_a_first_huge_clean_up_is_left_to_the_operator(pool: Pool, database: str) -> None:
    await add_errors(pool, 10_001, days=121)
    with capture_logs() as logs:
        assert await Retention(pool, [ERRORS]).run_once() == 0
    assert [(line["event"], line["remedy"]) for line in logs] == [("cleanup_held", "parley clean")]
    settings = load(database_url=database)
    told = [line async for line in look_ahead(settings)]
    assert next(line for line in told if "error_logs" in line).endswith("10,001 rows, due for up to 31.0 days")
    assert told[-1].startswith("Nothing was deleted")
    assert await count(pool, "error_logs") == 10_001
    told = [line async for line in clean_up(settings)]
    assert any("10,001 rows deleted" in line for line in told)
    assert await count(pool, "error_logs") == 0


@pytest.mark.parametrize(
    ("rows", "late", "others", "held"),
    [
        (10_001, 6, 0, False),
        (10_000, 500, 0, False),
        (10_001, 8, 0, True),
        (10_001, 8, 15_000, False),
        (10_001, 31, 15_000, True),
    ],
)
async def test_what_a_server_that_was_away_finds_it_cleans_up(
    pool: Pool, rows: int, late: float, others: int, held: bool
) -> None:
    """Not what is late for more than a week and most of the table, nor what is late for more than a month."""
    await add_errors(pool, rows, days=90 + late)
    await add_errors(pool, others, days=1)
    await pool.execute("analyze error_logs")
    assert await Retention(pool, [ERRORS]).run_once() == (0 if held else rows)


async def test_a_restored_backup_that_nobody_has_analysed_is_held(pool: Pool, database: str) -> None:
    await old_stream(pool, 40, events=10_500)
    with capture_logs() as logs:
        assert await Retention(pool, [events(database)]).run_once() == 0
    assert [line["event"] for line in logs] == ["cleanup_held"]
    assert await count(pool, "streaming_events") == 10_500


async def test_rows_are_estimated_over_all_partitions(pool: Pool) -> None:
    for days in (9, 8):
        await old_stream(pool, days, events=500)
    assert await estimate(pool, "streaming_events") == pytest.approx(1_000, rel=0.3)
    await pool.execute("analyze streaming_events")
    assert await estimate(pool, "streaming_events") == 1_000


# -- days of the log


async def old_stream(pool: Pool, days: float, *, events: int = 3, status: str = "completed") -> UUID:
    """A stream of so many days ago with its events, and the partition of its day."""
    moment = datetime.now(UTC) - timedelta(days=days)
    midnight = moment.replace(hour=0, minute=0, second=0, microsecond=0)
    stream_id = UUID(int=first_id(moment).int + uuid4().int % 2**62)
    await pool.execute(
        f"create table if not exists streaming_events_{midnight:%Y%m%d} partition of streaming_events"
        f" for values from ('{first_id(midnight)}') to ('{first_id(midnight + timedelta(days=1))}')"
    )
    last, ended = (None, None) if status == "active" else (events, moment)
    await pool.execute(
        "insert into streaming_sessions"
        " (id, user_id, session_id, chatbot_id, chatbot_version, flow_type, status, last_event_id, ended_at)"
        " values ($1, 'u', 's', 'c', 1, 'main', $2, $3, $4)",
        stream_id,
        status,
        last,
        ended,
    )
    payload = '{"event":"token","data":{},"timestamp":"x"}'
    await pool.executemany(
        "insert into streaming_events values ($1, $2, $3)", [(stream_id, n, payload) for n in range(1, events + 1)]
    )
    return stream_id


def events(database: str, *, days: float = 2) -> Events:
    return Events(database, days * DAY_S)


async def test_old_days_are_dropped_and_their_streams_are_gone_then_unknown(pool: Pool, database: str) -> None:
    await Partitions(pool, days_ahead=1).run_once()
    old, young = await old_stream(pool, 9), await old_stream(pool, 1)
    retention = Retention(pool, [events(database), Rows("streaming_sessions", "ended_at", 7 * DAY_S)])
    assert (await events(database).expired(pool, 10)).rows >= 1
    async with engine(database) as gateway:
        assert len(await gateway.tail.read(old, 0, 10)) == 3
        assert await Retention(pool, [events(database)]).run_once() > 0
        state = await gateway.tail.state(old, owner=None)
        with pytest.raises(Gone):
            await gateway.tail.read_known(old, 0, 10, state)
        assert len(await gateway.tail.read(young, 0, 10)) == 3
    await retention.run_once()
    assert await pool.fetchval("select count(*) from streaming_sessions") == 1
    assert await events(database).clean(pool, 1) == 0


async def test_a_day_with_an_unfinished_stream_stays(pool: Pool, database: str) -> None:
    stuck = await old_stream(pool, 9, status="active")
    await old_stream(pool, 8)
    await Retention(pool, [events(database)]).run_once()
    assert await count(pool, "streaming_events") == 3
    await pool.execute("update streaming_sessions set status = 'failed' where id = $1", stuck)
    await Retention(pool, [events(database)]).run_once()
    assert await count(pool, "streaming_events") == 0


async def test_what_was_interrupted_is_finished(pool: Pool, database: str) -> None:
    """Detached and not dropped; and detaching that somebody stopped half way."""
    await old_stream(pool, 9)
    await old_stream(pool, 8)
    nine, eight = [row["relname"] for row in await pool.fetch(_OLD_TABLES)]
    await pool.execute(f"alter table streaming_events detach partition {nine}")
    reader = await asyncpg.connect(database)
    async with reader.transaction():
        await reader.fetch("select * from streaming_events")
        with pytest.raises((asyncpg.LockNotAvailableError, asyncpg.QueryCanceledError)):
            await pool.execute(f"alter table streaming_events detach partition {eight} concurrently", timeout=3)
    await reader.close()
    assert await pool.fetchval("select count(*) from pg_inherits where inhdetachpending") == 1
    await Retention(pool, [events(database)]).run_once()
    assert await pool.fetch(_OLD_TABLES) == []


_OLD_TABLES = """
select relname from pg_class where relkind = 'r' and relname like 'streaming_events_2%'
    and relname < 'streaming_events_' || to_char(now() - interval '3 days', 'YYYYMMDD') order by 1
"""


async def test_a_day_that_is_being_read_waits_for_another_pass(pool: Pool, database: str) -> None:
    await old_stream(pool, 9)
    reader = await asyncpg.connect(database)
    async with reader.transaction():
        await reader.fetch("select * from streaming_events")
        assert await events(database).clean(pool, 1) == 0
    await reader.close()
    assert await events(database).clean(pool, 1) > 0


async def test_d15_a_reader_whose_day_goes_is_told(pool: Pool, database: str) -> None:
    """A page is there whole or not at all, and what follows a page is 410, never a hole."""
    stream_id = await old_stream(pool, 9, events=20)
    async with engine(database) as gateway:
        state = await gateway.tail.state(stream_id, owner=None)
        assert len(await gateway.tail.read_known(stream_id, 0, 7, state)) == 7
        cleaning = asyncio.create_task(Retention(pool, [events(database)]).run_once())
        seen = await until_gone(gateway, stream_id, state)
        await cleaning
        assert seen <= {13}


@pytest.mark.parametrize("pages", [1, 2])
async def test_d15_a_reader_that_follows_is_told_after_whichever_page(
    pool: Pool, database: str, pages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.streams.tail._PAGE", 7)
    stream_id = await old_stream(pool, 9, events=20)
    async with engine(database) as gateway, aclosing(gateway.tail.follow(stream_id, 0, 60)) as following:
        assert [(await anext(following)).last for _ in range(pages)] == [7, 14][:pages]
        assert await Retention(pool, [events(database)]).run_once() > 0
        with pytest.raises(Gone):
            async with asyncio.timeout(10):
                await anext(following)


async def until_gone(gateway: Engine, stream_id: UUID, state: State) -> set[int]:
    """The sizes of pages behind the seventh event, until the reader is told."""
    seen = set()
    async with asyncio.timeout(10):
        while True:
            try:
                seen.add(len(await gateway.tail.read_known(stream_id, 7, 100, state)))
            except Gone:
                return seen


async def test_d16_two_clean_ups_at_once(pool: Pool, database: str) -> None:
    for days in (9, 10, 11, 12):
        await old_stream(pool, days)
    passes = [Retention(pool, [events(database)]).run_once() for _ in range(3)]
    await asyncio.gather(*passes)
    await Retention(pool, [events(database)]).run_once()
    assert await pool.fetch(_OLD_TABLES) == []


# -- pictures


async def picture_of(pool: Pool, *, days: float) -> UUID:
    """A picture that was uploaded so long ago."""
    image_id = uuid4()
    await pool.execute(
        "insert into images (id, user_id, sha256, mime, width, height, bytes, data, updated_at)"
        " values ($1, 'ann', $2, 'image/png', 1, 1, 1, 'x', now() - make_interval(secs => $3))",
        image_id,
        image_id.bytes,
        days * DAY_S,
    )
    return image_id


async def kept_images(pool: Pool) -> set[UUID]:
    return {row["id"] for row in await pool.fetch("select id from images")}


async def test_pictures_that_no_message_named_go_and_others_stay(pool: Pool) -> None:
    young, named = await picture_of(pool, days=89), await picture_of(pool, days=300)
    await picture_of(pool, days=91)
    await Images(Wall(pool), Decoders(Limits(), processes=1)).read(str(named), user_id="ann")
    assert await Retention(pool, [images_expiring(90 * DAY_S)]).run_once() == 1
    assert await kept_images(pool) == {young, named}


async def test_large_rows_go_in_smaller_pieces(pool: Pool) -> None:
    for _ in range(101):
        await picture_of(pool, days=91)
    assert [await images_expiring(90 * DAY_S).clean(pool, 5_000) for _ in range(3)] == [100, 1, 0]


async def test_pictures_of_messages_from_before_the_migration_stay(empty_database: str) -> None:
    await migrate_to(empty_database, "0006")
    pool = await open_pool(empty_database, 1)
    sent, waiting = await picture_of(pool, days=91), await picture_of(pool, days=91)
    await picture_of(pool, days=91)
    await pool.execute(
        "insert into messages (user_id, id, chat_id, content, role, position, attachments)"
        " values ('ann', 'm', 'c', '', 'user', 1, $1)",
        f'[{{"type":"image","id":"{str(sent).upper()}"}}]',
    )
    await pool.execute(
        "insert into queued_messages (user_id, session_id, message_id, stream_id, place, chatbot_id, text, request)"
        " values ('ann', 's', 'n', gen_random_uuid(), 1, 'c', '', $1)",
        f'{{"configuration":{{}},"history":null,"image_id":"{waiting.hex}","request_id":null}}',
    )
    await migrate(empty_database)
    await Retention(pool, [images_expiring(90 * DAY_S)]).run_once()
    assert await kept_images(pool) == {sent, waiting}
    await pool.close()


# -- sessions and waiting messages


async def test_idle_sessions_go_each_after_its_chatbot_s_time_and_chats_stay(house: Open, pool: Pool) -> None:
    async with house() as home:
        flow: dict[str, Any] = {"flows": {"main": {"provider": "demo", "model": "demo?delay_ms=0&key=forgotten"}}}
        await home.apply(short=flow | {"keep_sessions_days": 1})
        (kept, _), (gone, _) = await home.ask("quick"), await home.ask("short")
        await home.database.execute("update conversation_sessions set updated_at = now() - interval '2 days'")
        sessions = Sessions(Chatbots(pool), 30 * DAY_S)
        assert (await sessions.expired(pool, 10)).rows == 1
        assert await sessions.clean(pool, 10) == 1
        assert [row["id"] for row in await pool.fetch("select id from conversation_sessions")] == [kept["session_id"]]
        _, frames = await home.ask("short", session_id=gone["session_id"], message_text="Again")
        assert frames[-1].data["data"]["status"] == "completed"
        async with client_of(home.demo.removesuffix("/v1")) as demo:
            asked = (await demo.get("/demo/requests", params={"key": "forgotten"})).json()["requests"]
        assert [message["content"] for message in asked[-1]["body"]["messages"]][::2] == ["Hello", "Again"]


async def test_a_message_that_waited_for_too_long_is_cancelled(house: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.gateway.loops._JOBS_S", 0.1)
    async with house({"slow": "demo?delay_ms=20&tokens=2000"}, keep_streams_days=1) as home:
        first = (await home.post("slow")).json()
        waiting = (await home.post("slow", session_id=first["session_id"])).json()
        assert waiting["status"] == "queued"
        await home.database.execute("update queued_messages set created_at = now() - interval '2 days'")
        await home.database.execute("update job_runs set next_at = now() where name = 'retention'")
        row = await home.row(
            f"select status from streaming_sessions where id = '{waiting['streaming_session_id']}'"
            " and status = 'cancelled'"
        )
        assert row["status"] == "cancelled"
