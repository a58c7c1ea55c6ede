"""The second wall: without any owner in the query, another user's rows are not there (G19)."""

import asyncio
from collections.abc import AsyncGenerator, Collection
from contextlib import asynccontextmanager, suppress
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from app import roles
from app.access.client import Proxies
from app.access.credentials import Credentials
from app.access.guard import guard
from app.access.keys import Keys
from app.access.limits import Limits as RateLimits
from app.access.principal import Principal
from app.chats import store
from app.errors import Unavailable
from app.flows import queue
from app.postgres import Pool, open_pool
from app.server import serving
from app.streams import tail
from app.streams.partitions import Partitions
from app.streams.stream import NEW_ID, random_part
from app.telemetry import Metrics
from app.wall import Reach, Wall, narrow, within
from tests.serving import client_of

_TABLES = """
select c.relname from pg_class c where c.relnamespace = 'public'::regnamespace and c.relkind in ('r', 'p')
and not c.relispartition
"""
_WITH_USER = f"""{_TABLES} and exists (
    select from pg_attribute a where a.attrelid = c.oid and a.attname = 'user_id' and not a.attisdropped)
order by 1
"""
# What a column must be given: the others have a default, or may be null.
_NEEDED = """
select column_name as name, data_type as type from information_schema.columns
where table_schema = 'public' and table_name = $1 and is_nullable = 'NO' and column_default is null
"""
_VALUES = {
    "date": "'2026-01-01'",
    "timestamp with time zone": "now()",
    "double precision": "1",
    "text": "'x'",
    "uuid": "gen_random_uuid()",
    "bytea": r"'\x01'",
    "integer": "1",
    "bigint": "1",
}
_CHOSEN = {
    "from_user_id": "gen_random_uuid()::text",
    "role": "'user'",
    "status": "'active'",
    "mime": "'image/png'",
    "message_id": "'m'",
}


async def _add(connection: asyncpg.Connection, table: str, user: str) -> None:
    values = {"user_id": f"'{user}'"}
    for column in await connection.fetch(_NEEDED, table):
        name = column["name"]
        values.setdefault(name, _CHOSEN.get(name) or _VALUES[column["type"]])
    await connection.execute(f"insert into {table} ({', '.join(values)}) values ({', '.join(values.values())})")


@pytest.fixture
async def owner(database: str) -> AsyncGenerator[asyncpg.Connection, None]:
    connection = await asyncpg.connect(database)
    yield connection
    await connection.close()


@pytest.fixture
async def pool(database: str) -> AsyncGenerator[Pool, None]:
    pool = await open_pool(database, 2)
    yield pool
    pool.terminate()


@pytest.fixture
async def wall(database: str, pool: Pool) -> AsyncGenerator[Wall, None]:
    async with Wall(pool, demand="require").open(database, 2) as wall:
        async with pool.acquire() as connection:
            await wall.look_for_role(connection)
        yield wall


async def _with_user(owner: asyncpg.Connection) -> list[str]:
    return [row["relname"] for row in await owner.fetch(_WITH_USER)]


async def _stream_of(owner: asyncpg.Connection, pool: Pool, user: str, events: int = 3) -> UUID:
    await Partitions(pool, days_ahead=1).run_once()
    stream: UUID = await owner.fetchval(
        f"""
        insert into streaming_sessions
            (id, user_id, session_id, chatbot_id, chatbot_version, flow_type, status, last_event_id)
        values ({NEW_ID.format(random_part="$1")}, $2, 's', 'c', 1, 'main', 'completed', $3) returning id
        """,
        random_part(),
        user,
        events,
    )
    rows = [(stream, number, f"{user} {number}") for number in range(1, events + 1)]
    await owner.executemany("insert into streaming_events (stream_id, id, payload) values ($1, $2, $3)", rows)
    return stream


# -- every table


async def test_every_table_is_guarded_or_out_of_reach(owner: asyncpg.Connection) -> None:
    role = await roles.find(owner)
    tables = [row["relname"] for row in await owner.fetch(_TABLES)]
    guarded = "select relrowsecurity from pg_class where oid = $1::text::regclass"
    rights = "select has_any_column_privilege($1, $2::text::regclass, 'select, insert, update, references')"
    open_ = [t for t in tables if await owner.fetchval(rights, role, t) and not await owner.fetchval(guarded, t)]
    assert open_ == ["replicas"], "for the fence, two columns; anything else that requests touch needs row security"
    unguarded = [t for t in await _with_user(owner) if not await owner.fetchval(guarded, t)]
    assert not unguarded, "a table with users' rows needs row security and policies: docs/security.md"


async def test_without_any_condition_a_user_sees_and_changes_own_rows_only(
    owner: asyncpg.Connection, wall: Wall
) -> None:
    tables = await _with_user(owner)
    assert len(tables) >= 7
    for table in tables:
        for user in ("ann", "bob"):
            await _add(owner, table, user)
        with within(Reach("bob")):
            async with wall.connection() as connection:
                assert {row["user_id"] for row in await connection.fetch(f"select * from {table}")} == {"bob"}, table
                assert await connection.execute(f"update {table} set created_at = now()") == "UPDATE 1", table
                assert await connection.execute(f"delete from {table} where user_id = 'ann'") == "DELETE 0", table
            for theft in (f"update {table} set user_id = 'ann'", f"update {table} set user_id = ''"):
                with pytest.raises(asyncpg.InsufficientPrivilegeError, match="row-level security"):
                    async with wall.connection() as connection:
                        await connection.execute(theft if table != "images" else theft.replace("''", "'ann'"))
            with pytest.raises(asyncpg.InsufficientPrivilegeError, match="row-level security"):
                async with wall.connection() as connection:
                    await _add(connection, table, "ann")  # type: ignore[arg-type]
            async with wall.connection() as connection:
                assert await connection.execute(f"delete from {table}") == "DELETE 1", table
        assert {row["user_id"] for row in await owner.fetch(f"select * from {table}")} == {"ann"}, table


async def test_who_is_nobody_sees_nothing(owner: asyncpg.Connection, wall: Wall) -> None:
    tables = await _with_user(owner)
    for table in tables:
        await _add(owner, table, "ann")
        await _add(owner, table, "")
    await _stream_of(owner, wall._pool, "ann")
    # A token for a stream that does not exist: no user, and nothing to read.
    with within(Reach(streams=frozenset({uuid4()}))):
        async with wall.connection() as connection:
            for table in (*tables, "streaming_events"):
                assert not await connection.fetch(f"select * from {table}"), table


# -- events, which have no user


async def _read(wall: Wall, *streams: UUID) -> set[str]:
    async with wall.connection(streams=streams) as connection:
        return {row["payload"] for row in await connection.fetch("select * from streaming_events")}


async def test_events_are_those_of_the_streams_that_are_asked_for_and_may_be_read(
    owner: asyncpg.Connection, wall: Wall
) -> None:
    anns, bobs = [await _stream_of(owner, wall._pool, user, 1) for user in ("ann", "bob")]
    with within(Reach("bob")):
        assert await _read(wall, anns, bobs) == {"bob 1"}
        assert await _read(wall, anns) == await _read(wall) == set()
    with within(Reach(streams=frozenset({anns}))):
        assert await _read(wall, anns, bobs) == {"ann 1"}
    assert await _read(wall) == {"ann 1", "bob 1"}, "the gateway's own work is not touched"


async def test_events_are_added_to_own_streams_only_and_never_change(owner: asyncpg.Connection, wall: Wall) -> None:
    anns, bobs = [await _stream_of(owner, wall._pool, user, 1) for user in ("ann", "bob")]
    insert = "insert into streaming_events (stream_id, id, payload) values ($1, 2, 'more')"
    with within(Reach("bob")):
        async with wall.connection(streams=[anns, bobs]) as connection:
            await connection.execute(insert, bobs)
            assert await connection.execute("update streaming_events set payload = ''") == "UPDATE 0"
            assert await connection.execute("delete from streaming_events") == "DELETE 0"
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            async with wall.connection(streams=[anns, bobs]) as connection:
                await connection.execute(insert, anns)
        day = await owner.fetchval("select tableoid::regclass::text from streaming_events limit 1")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            async with wall.connection(streams=[anns]) as connection:
                await connection.fetch(f"select * from {day}")


async def test_a_picture_of_nobody_is_for_every_user(owner: asyncpg.Connection, wall: Wall) -> None:
    await _add(owner, "images", "")
    with within(Reach("bob")):
        async with wall.connection() as connection:
            assert await connection.execute("update images set sent = true") == "UPDATE 1"
            assert await connection.execute("delete from images") == "DELETE 0"
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            async with wall.connection() as connection:
                await _add(connection, "images", "")  # type: ignore[arg-type]


# -- nothing is left behind


async def test_nothing_leaks_to_whoever_comes_next(owner: asyncpg.Connection, wall: Wall) -> None:
    users = [f"user {number}" for number in range(12)]
    for user in users:
        await _add(owner, "chats", user)
    seen: list[set[str]] = []

    async def ask(user: str, number: int) -> None:
        with within(Reach(user)):
            async with wall.connection(within_s=10 if number % 2 else None) as connection:
                rows = await connection.fetch("select user_id from chats")
                seen.append({user, *(row["user_id"] for row in rows)})
                if number % 3 == 1:
                    await connection.fetch("select 1 / 0")
                if number % 3 == 2:
                    await connection.fetch("select pg_sleep(60)")

    async def look() -> None:
        async with wall.connection() as connection:
            row = await connection.fetchrow("select count(*) as chats, current_user as role from chats")
            assert row is not None
            assert (row["chats"], row["role"].startswith(roles.PREFIX)) == (len(users), False)

    # Two connections, which end in every way: committed, broken by an error, cancelled in the middle of a statement.
    for turn in range(6):
        asked = [asyncio.create_task(ask(user, turn + number)) for number, user in enumerate(users[turn:][:4])]
        await asyncio.gather(*(look() for _ in range(3)))
        for task in asked:
            await asyncio.wait([task], timeout=0.05)
            task.cancel()
            with suppress(asyncpg.DivisionByZeroError, asyncio.CancelledError):
                await task
    assert len(seen) > 12
    assert all(len(users_seen) == 1 for users_seen in seen), seen
    await look()


async def test_a_connection_behind_the_wall_shows_nothing_by_itself(owner: asyncpg.Connection, wall: Wall) -> None:
    await _add(owner, "chats", "ann")
    with within(Reach("ann")):
        async with wall.connection() as connection:
            assert len(await connection.fetch("select * from chats")) == 1
        behind, _ = wall.entrance()
    assert await behind.fetch("select * from chats") == [], "the user went with the transaction, the role did not"
    assert (await behind.fetchval("select current_user")).startswith(roles.PREFIX)


async def test_a_single_question_is_told_whose_it_is_and_nothing_of_it_stays(
    owner: asyncpg.Connection, wall: Wall
) -> None:
    for user in ("ann", "bob"):
        await _add(owner, "chats", user)
    asked = "select string_agg(user_id, ',') as users, $1::int as number from chats where $1 > 0"
    for user, seen in (("ann", "ann"), ("bob", "bob"), ("carl", None), ("", None)):
        with within(Reach(user)):
            row = await wall.fetchrow(asked, 7)
            assert row is not None
            assert (row["users"], row["number"]) == (seen, 7)
            behind, _ = wall.entrance()
        assert await behind.fetch("select * from chats") == []
    with within(Reach(streams=frozenset({uuid4()}))):
        row = await wall.fetchrow(asked, 7)
        assert row is not None
        assert row["users"] is None
    row = await wall.fetchrow(asked, 7)
    assert row is not None
    assert sorted(row["users"].split(",")) == ["ann", "bob"], "nobody in particular reaches everybody's"


_TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(user=_TEXT | st.sampled_from(["'; reset role; --", "\\'; reset role; --", "\\", "E'", "{}", "$$", "'||'"]))
async def test_any_user_id_stays_what_it_is(wall: Wall, user: str) -> None:
    with within(Reach(user)):
        async with wall.connection() as connection:
            assert await connection.fetchval("select current_setting('parley.user_id')") == user
            assert (await connection.fetchval("select current_user")).startswith(roles.PREFIX)


# -- whose rows


async def test_who_acts_for_any_user_reaches_no_further_than_the_one_it_has_named(wall: Wall) -> None:
    def user(streams: Collection[UUID] = ()) -> str:
        return wall.entrance(streams)[1]

    with within(Reach()):
        assert user() == "begin"
        narrow("bob")
        assert "E'bob'" in user()
        narrow("ann")
        assert "E'bob'" in user(), "once and for all"
    assert user() == "begin"
    stream = uuid4()
    with within(Reach(streams=frozenset({stream}))):
        narrow("ann")
        assert "ann" not in user(), "a stream's token names no user"
        assert f"parley.leave = E'{{{stream}}}'" in user()


async def test_nobody_is_served_before_somebody_has_looked_for_the_role(database: str, pool: Pool) -> None:
    async with Wall(pool, demand="auto").open(database, 1) as wall:
        with within(Reach("ann")), pytest.raises(Unavailable, match="starting"):
            async with wall.connection():
                pass


async def test_a_role_that_was_dropped_is_no_way_in(owner: asyncpg.Connection, wall: Wall) -> None:
    await _add(owner, "chats", "ann")
    for number in range(2):  # its name is not free for a moment only
        wall._role = f"{roles.PREFIX}gone_{number}"
        with within(Reach("ann")), pytest.raises(Unavailable, match="database"):
            async with wall.connection():
                pass


# -- plans


@pytest.mark.parametrize(
    ("query", "index"),
    [
        (tail._STATES, "streaming_sessions_pkey"),
        (tail._EVENTS, "_pkey"),
        (queue._LIST, "queued_messages_place"),
        (store._HAS_CHAT, "chats_pkey"),
        (store._HISTORY, "messages_in_chat"),
    ],
)
async def test_reads_keep_their_plans(
    owner: asyncpg.Connection, wall: Wall, database: str, query: str, index: str
) -> None:
    stream = await _stream_of(owner, wall._pool, "bob")
    values = {
        tail._STATES: ([stream], [0], "bob"),
        tail._EVENTS: (stream, 0, 10),
        queue._LIST: ("bob", "s"),
        store._HAS_CHAT: ("bob", "s"),
        store._HISTORY: ("bob", "s", 10, 1000, 1000),
    }[query]
    async with wall._pool.acquire() as before:
        await before.execute("set enable_seqscan = off")
        plain = [row[0] for row in await before.fetch(f"explain (costs off) {query}", *values)]
    with within(Reach("bob")):
        async with wall.connection(streams=[stream]) as connection:
            # The tables are small here; what matters is that an index may be used.
            await connection.execute("set local enable_seqscan = off")
            walled = [row[0] for row in await connection.fetch(f"explain (costs off) {query}", *values)]

    def conditions(plan: list[str]) -> list[str]:
        return [line.strip() for line in plan if "Index Cond" in line and "parley" not in line]

    assert any(index in line for line in walled), walled
    assert all(condition in conditions(walled) for condition in conditions(plain)), (plain, walled)
    assert not any("Seq Scan" in line for line in walled if "Subquery" not in line), walled


async def test_a_statement_keeps_its_plan_for_every_user(wall: Wall) -> None:
    """The role is the connection's for good, so that nothing is planned anew for the next user."""
    counts = []
    for user in ("ann", "bob", "carl"):
        with within(Reach(user)):
            async with wall.connection() as connection:
                await connection.fetch(queue._LIST, user, "s")
                plans = "select generic_plans from pg_prepared_statements where statement = $1"
                counts.append(await connection.fetchval(plans, queue._LIST))
    assert counts == [1, 2, 3], "one connection, one statement, one plan"


async def _signed_in(token: str) -> Principal:
    return Principal("user", f"user:{token}", frozenset({"read"}), token)


async def test_a_route_that_asks_for_everything_gets_what_is_its_users(owner: asyncpg.Connection, wall: Wall) -> None:
    for user in ("ann", "bob"):
        await _add(owner, "chats", user)

    async def forgetful(_: Request[Any]) -> Response:
        async with wall.connection() as connection:
            return Response(",".join(row["user_id"] for row in await connection.fetch("select * from chats")))

    route = Route("/", forgetful)
    guard([route], {("GET", "/"): "read"})
    credentials = Credentials("keys", Keys(wall._pool), tokens=_signed_in)
    state = {"credentials": credentials, "limits": RateLimits({}, Metrics()), "proxies": Proxies()}

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncGenerator[dict[str, Any], None]:
        yield state

    app = Starlette(routes=[route], lifespan=lifespan)
    async with serving(app, "127.0.0.1", 0) as url, client_of(url) as client:
        for user in ("bob", "ann"):
            assert (await client.get("/", headers={"Authorization": f"Bearer {user}"})).text == user
