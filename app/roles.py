"""The role that users' requests run as: it sees only what the policies of the tables show to their user.

Roles belong to all databases of a server, so every database has one of its own. It is known by its rights, which go
with a copy of the database; where it has none, `parley migrate` makes one.
"""

import re
import secrets

import asyncpg

from app.errors import Misconfigured
from app.postgres import Connection

# The policies know the role by how its name begins, so that a dump names no role of another server's.
PREFIX = "parley_users_"
_LIKE = PREFIX.replace("_", r"\_") + "%"

_OURS = """
select r.rolname from pg_roles r
where r.rolname like $1 and has_table_privilege(r.oid, 'streaming_sessions', 'select') and pg_has_role(r.oid, $2)
order by r.oid limit 1
"""
# Made by somebody who may, for us who may not.
_GIVEN = """
select r.rolname from pg_auth_members m join pg_roles r on r.oid = m.roleid
where m.member = (select oid from pg_roles where rolname = current_user) and r.rolname like $1 order by r.oid limit 1
"""
_TABLES = """
select c.oid::regclass::text as name from pg_class c, pg_class streams
where streams.oid = 'streaming_sessions'::regclass and c.relnamespace = streams.relnamespace and c.relrowsecurity
order by 1
"""
_GUARDED = f"""
select name, row_security_active(name) as active,
    has_table_privilege(name, 'select') and has_table_privilege(name, 'insert') as granted
from ({_TABLES}) secured
"""
_OWNER = "select pg_get_userbyid(relowner) from pg_class where oid = 'streaming_sessions'::regclass"
_SCHEMA = "select relnamespace::regnamespace::text from pg_class where oid = 'streaming_sessions'::regclass"


async def find(connection: Connection) -> str:
    """The name of this database's role. Raises Misconfigured, with what to do, where there is none that keeps out."""
    role: str | None = await connection.fetchval(_OURS, _LIKE, _membership(connection))
    if role is None:
        raise await _none(connection)
    if missing := await _open(connection, role):
        raise Misconfigured(
            "row_security_missing", f"The role {role} is not kept out of {', '.join(missing)}: run `parley migrate`."
        )
    return role


async def _open(connection: Connection, role: str) -> list[str]:
    """Tables that row security does not guard from the role, or that it may not use at all."""
    async with connection.transaction():
        await connection.execute(f"set local role {quoted(role)}")
        rows = await connection.fetch(_GUARDED)
    return [row["name"] for row in rows if not (row["active"] and row["granted"])]


async def make(connection: Connection) -> str:
    """Make the role, or take one that was made for us, and let it into the tables that row security guards.

    As often as anybody likes. Raises Misconfigured, with what to do, where we may not and nobody did.
    """
    role = await connection.fetchval(_OURS, _LIKE, _membership(connection)) or await _new(connection)
    schema = await connection.fetchval(_SCHEMA)
    async with connection.transaction():
        if not await connection.fetchval("select has_schema_privilege($1, $2, 'usage')", role, schema):
            await connection.execute(f"grant usage on schema {schema} to {quoted(role)}")
        for row in await connection.fetch(_TABLES):
            await connection.execute(f"grant select, insert, update, delete on {row[0]} to {quoted(role)}")
        # The fence is a share lock, and those need the right to change a column.
        await connection.execute(f"grant select (id, alive), update (url) on replicas to {quoted(role)}")
    return await find(connection)


async def _new(connection: Connection) -> str:
    role = _name(await connection.fetchval("select current_database()"))
    owner = await connection.fetchval(_OWNER)
    # Only to become it: what it may do is not added to what the owner may.
    how = " with inherit false, set true" if _tells_set(connection) else ""
    try:
        async with connection.transaction():
            await connection.execute(f"create role {quoted(role)} nologin")
            await connection.execute(f"grant {quoted(role)} to {quoted(owner)}{how}")
    except asyncpg.InsufficientPrivilegeError:
        given: str | None = await connection.fetchval(_GIVEN, _LIKE)
        if given is None:
            raise await _none(connection) from None
        return given
    return role


async def _none(connection: Connection) -> Misconfigured:
    row = await connection.fetchrow("select current_database() as database, current_user as login")
    assert row is not None
    role = quoted(_name(row["database"]))
    return Misconfigured(
        "row_security_missing",
        "PostgreSQL has no role for users' requests: run `parley migrate`. Where that may not make roles, have an "
        f"administrator run `create role {role} nologin; grant {role} to {quoted(row['login'])};` before.",
    )


def _name(database: str) -> str:
    """One that no other database of the server has, nor had."""
    return f"{PREFIX}{re.sub('[^a-z0-9_]', '_', database.lower())[:40]}_{secrets.token_hex(4)}"


def _tells_set(connection: Connection) -> bool:
    """Since version 16 becoming a role and having its rights are two things."""
    return connection.get_server_version().major >= 16


def _membership(connection: Connection) -> str:
    return "set" if _tells_set(connection) else "member"


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
