"""The role of users' requests: who may make it, how a database knows it, and which ones do not count."""

import re
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

import asyncpg
import pytest
from structlog.testing import capture_logs

from app import roles
from app.errors import Misconfigured
from app.postgres import open_pool
from app.schema import migrate
from app.wall import Reach, Wall, within
from tests.command import run
from tests.conftest import Server


@asynccontextmanager
async def connected(dsn: str) -> AsyncGenerator[asyncpg.Connection, None]:
    connection = await asyncpg.connect(dsn)
    try:
        yield connection
    finally:
        await connection.close()


def as_login(dsn: str, login: str) -> str:
    url = urlsplit(dsn)
    return urlunsplit(url._replace(netloc=f"{login}@{url.netloc.rpartition('@')[2]}"))


@pytest.fixture
def modest(server: Server, empty_database: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """A database whose owner is no superuser; a parameter is what it may besides."""
    login, name = f"modest_{uuid4().hex[:8]}", urlsplit(empty_database).path[1:]
    server.execute(f"create role {login} login {getattr(request, 'param', '')}")
    server.execute(f"alter database {name} owner to {login}")
    yield as_login(empty_database, login)
    server.drop(name)
    server.execute(f"drop role {login}")


async def test_a_superuser_makes_one_role_per_database(server: Server, empty_database: str, database: str) -> None:
    assert (await migrate(empty_database)).complaint is None
    async with connected(empty_database) as one, connected(database) as other:
        made = await roles.find(one)
        assert made.startswith(roles.PREFIX + urlsplit(empty_database).path[1:41])
        assert made != await roles.find(other)
        assert await roles.make(one) == made, "migrating again makes no second one"
        about = await one.fetchrow("select * from pg_roles where rolname = $1", made)
        assert about is not None
        assert not any(about[what] for what in ("rolcanlogin", "rolsuper", "rolbypassrls", "rolcreaterole"))


@pytest.mark.parametrize("modest", ["createrole"], indirect=True)
async def test_a_login_that_may_make_roles_makes_it_for_itself(modest: str) -> None:
    assert (await migrate(modest)).complaint is None
    async with connected(modest) as connection:
        role = await roles.find(connection)
        await connection.execute("insert into chats (user_id, id) values ('ann', '1')")
        await connection.execute(f'set role "{role}"')
        assert await connection.fetch("select * from chats") == []


async def test_where_nobody_may_an_administrator_is_told_what_to_run(server: Server, modest: str) -> None:
    told = await run("migrate", DATABASE_URL=modest)
    assert told.code == 0
    (line,) = [line for line in told.err if "kept apart" in line]
    refused = await run("migrate", DATABASE_URL=modest, PARLEY_ROW_SECURITY="require")
    assert (refused.code, "administrator" in refused.err[-1]) == (2, True)
    for demand, fine in (("auto", "ok  "), ("require", "FAIL"), ("off", "ok  ")):
        said = await run("doctor", DATABASE_URL=modest, PARLEY_ROW_SECURITY=demand)
        assert [one[:4] for one in said.out if "row security" in one] == [fine], said
    (statements,) = re.findall("`(create role .*)`", line)
    server.execute(statements)
    assert (await migrate(modest)).complaint is None
    async with connected(modest) as connection:
        assert f'"{await roles.find(connection)}"' in statements


async def test_without_the_role_the_first_wall_stands_alone_and_it_is_said_once(modest: str) -> None:
    await migrate(modest)
    pool = await open_pool(modest, 2)
    try:
        async with Wall(pool, demand="auto").open(modest, 1) as wall, pool.acquire() as connection:
            with capture_logs() as logs:
                for _ in range(3):
                    await wall.look_for_role(connection)
            assert [line["event"] for line in logs] == ["row_security_missing"]
            with within(Reach("ann")):
                async with wall.connection() as one:
                    assert await one.fetchval("select current_user") == urlsplit(modest).username
        strict = Wall(pool, demand="require")
        async with pool.acquire() as connection:
            with pytest.raises(Misconfigured, match="run `parley migrate`"):
                await strict.look_for_role(connection)
    finally:
        pool.terminate()


_GIFTS = ("alter role {role} bypassrls", "alter role {role} superuser", "alter table chats owner to {role}")


@pytest.mark.parametrize("gift", _GIFTS)
async def test_a_role_that_row_security_does_not_stop_is_none(empty_database: str, gift: str) -> None:
    await migrate(empty_database)
    async with connected(empty_database) as connection:
        role = await roles.find(connection)
        await connection.execute(gift.format(role=f'"{role}"'))
        with pytest.raises(Misconfigured, match="is not kept out of"):
            await roles.find(connection)


async def test_a_table_that_the_role_was_not_let_into_is_told(database: str) -> None:
    async with connected(database) as connection:
        await connection.execute("create table diaries (user_id text); alter table diaries enable row level security")
        with pytest.raises(Misconfigured, match="diaries: run `parley migrate`"):
            await roles.find(connection)
        assert await roles.make(connection)


async def test_a_role_for_reports_sees_what_it_is_granted_as_ever(database: str) -> None:
    login = f"reports_{uuid4().hex[:8]}"
    async with connected(database) as connection:
        await connection.execute("insert into chats (user_id, id) values ('ann', '1'), ('bob', '1')")
        await connection.execute(f"create role {login} login; grant select on chats to {login}")
        async with connected(as_login(database, login)) as reports:
            assert await reports.fetchval("select count(*) from chats") == 2
        await connection.execute(f"drop owned by {login}; drop role {login}")
