"""A table built beside the one that is read, and put in its place: what it must have besides the rows.

Its columns and checks, indexes, policies, rights and names are read from the catalogue, so that a migration that adds
one needs no word here.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import asyncpg

from app.postgres import Connection
from app.roles import quoted

_TABLE = """
select c.relnamespace::regnamespace::text as schema, c.relrowsecurity as secured,
    coalesce(array_to_string(c.reloptions, ', '), '') as options,
    pg_get_serial_sequence(c.oid::regclass::text, 'id') as ids
from pg_class c where c.oid = $1::text::regclass
"""
_COLUMNS = """
select attname from pg_attribute where attrelid = $1::text::regclass and attnum > 0 and not attisdropped order by attnum
"""
_INDEXES = """
select c.relname as name, pg_get_indexdef(i.indexrelid) as definition, i.indisprimary as is_primary
from pg_index i join pg_class c on c.oid = i.indexrelid where i.indrelid = $1::text::regclass
order by not i.indisunique, c.relname
"""
_POLICIES = """
select p.policyname as name, p.permissive, p.cmd, p.qual, p.with_check,
    array_to_string(
        array(select case when r = 'public' then r::text else quote_ident(r) end from unnest(p.roles) r), ', ') as roles
from pg_policies p join pg_class c on c.oid = $1::text::regclass
where p.tablename = c.relname and p.schemaname = c.relnamespace::regnamespace::text order by 1
"""
_GRANTS = """
select case when a.grantee = 0 then 'public' else a.grantee::regrole::text end as grantee, a.privilege_type as privilege
from pg_class c, aclexplode(c.relacl) a where c.oid = $1::text::regclass
"""
_SET = "select setval($1::text::regclass, last_value, is_called) from {ids}"
_INDEX = re.compile(r"CREATE (UNIQUE )?INDEX \S+ ON \S+ (USING .*)", re.DOTALL)

# Longer than any of the statements that have to read a whole table takes.
LONG_S = 3600


@dataclass(frozen=True, slots=True)
class Index:
    name: str
    definition: str
    is_primary: bool


@dataclass(frozen=True, slots=True)
class Replacement:
    """Of `table`, which has a key `id` that counts itself. `ids` is the sequence that goes on counting meanwhile."""

    table: str
    schema: str
    columns: Sequence[str]
    indexes: Sequence[Index]
    ids: str

    @property
    def next(self) -> str:
        return f"{self.schema}.{self.table}_next"

    @classmethod
    async def made(cls, connection: Connection, table: str) -> "Replacement":
        """An empty one without indexes, in one transaction."""
        row = await connection.fetchrow(_TABLE, table)
        assert row is not None
        columns = [found["attname"] for found in await connection.fetch(_COLUMNS, table)]
        indexes = [Index(*found) for found in await connection.fetch(_INDEXES, table)]
        new = cls(table, row["schema"], columns, indexes, row["ids"])
        options = f" with ({row['options']})" if row["options"] else ""
        async with connection.transaction():
            await connection.execute(f"create table {new.next} (like {table} including all excluding indexes){options}")
            for statement in await _guards(connection, table, new.next, secured=row["secured"]):
                await connection.execute(statement)
        return new

    async def index(self, connection: Connection, index: Index) -> None:
        found = _INDEX.fullmatch(index.definition)
        assert found is not None
        name = f"{index.name}_next"
        statement = f"create {found[1] or ''}index {name} on {self.next} {found[2]}"
        await connection.execute(statement, timeout=LONG_S)
        if index.is_primary:
            await connection.execute(f"alter table {self.next} add constraint {name} primary key using index {name}")

    async def swap(self, connection: Connection) -> None:
        """Take the table's place, in a transaction that holds its lock. The old one is dropped."""
        own = await connection.fetchval("select pg_get_serial_sequence($1, 'id')", self.next)
        await connection.execute(_SET.format(ids=self.ids), own)
        name = self.ids.rpartition(".")[2]
        await connection.execute(f"drop table {self.schema}.{self.table}")
        await connection.execute(f"alter table {self.next} rename to {self.table}")
        await connection.execute(f"alter sequence {own} rename to {name}")
        for index in self.indexes:
            await connection.execute(f"alter index {self.schema}.{index.name}_next rename to {index.name}")


async def _guards(connection: Connection, table: str, new: str, *, secured: bool) -> list[str]:
    """Row security, its policies and the rights."""
    statements = [f"alter table {new} enable row level security"] if secured else []
    statements += [_policy(row, new) for row in await connection.fetch(_POLICIES, table)]
    grants = await connection.fetch(_GRANTS, table)
    return statements + [f"grant {row['privilege']} on {new} to {row['grantee']}" for row in grants]


def _policy(row: asyncpg.Record, new: str) -> str:
    statement = (
        f"create policy {quoted(row['name'])} on {new} as {row['permissive']} for {row['cmd']} to {row['roles']}"
    )
    if row["qual"] is not None:
        statement += f" using ({row['qual']})"
    return statement if row["with_check"] is None else f"{statement} with check ({row['with_check']})"
