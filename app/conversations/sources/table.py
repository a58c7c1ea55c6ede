"""A foreign table as the catalogue describes it, and its name made safe."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import asyncpg

from app.errors import Misconfigured
from app.postgres import Connection

_NAME = re.compile(r"(?:([A-Za-z0-9_]{1,63})\.)?([A-Za-z0-9_]{1,63})")

_FIND = "select to_regclass($1)::oid"
_TABLE = """
select c.relkind::text as kind, c.relhassubclass, row_security_active(c.oid) as is_filtered,
    has_table_privilege(c.oid, 'select') as is_readable,
    quote_ident(n.nspname) || '.' || quote_ident(c.relname) as quoted
from pg_class c join pg_namespace n on n.oid = c.relnamespace where c.oid = $1
"""
# A domain's columns have the type behind it, arrays another.
_COLUMNS = """
select a.attname as name, case when t.typtype = 'd' then b.typname else t.typname end as type,
    a.attnotnull, (a.attidentity <> '' or coalesce(pg_get_expr(d.adbin, d.adrelid) like 'nextval(%', false)) as counts,
    coalesce(pg_get_expr(d.adbin, d.adrelid) ~* '^(now\\(\\)|current_timestamp|transaction_timestamp\\(\\))', false)
        as is_now
from pg_attribute a
join pg_type t on t.oid = a.atttypid left join pg_type b on b.oid = t.typbasetype
left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
where a.attrelid = $1 and a.attnum > 0 and not a.attisdropped order by a.attnum
"""
# The first column of each index that a search by this column can use.
_INDEXES = """
select a.attname as first, i.indisunique and i.indnkeyatts = 1 as is_unique, i.indisprimary as is_primary
from pg_index i join pg_attribute a on a.attrelid = i.indrelid and a.attnum = i.indkey[0]
join pg_class x on x.oid = i.indexrelid join pg_am m on m.oid = x.relam
where i.indrelid = $1 and i.indisvalid and i.indpred is null and m.amname = 'btree'
"""


@dataclass(frozen=True, slots=True)
class TableName:
    """`name`, or `schema.name`."""

    schema: str | None
    name: str

    @classmethod
    def of(cls, text: str) -> Self:
        """Raises ValueError with the rule for anything but letters, digits and underscores."""
        if not (matched := _NAME.fullmatch(text)):
            raise ValueError(
                "must be the name of a table, or schema.table: ASCII letters of either case, digits and underscores, "
                "each at most 63, without quotes"
            )
        return cls(matched[1], matched[2])

    @property
    def quoted(self) -> str:
        parts = [self.schema, self.name] if self.schema else [self.name]
        return ".".join(map(quoted, parts))

    def __str__(self) -> str:
        return f"{self.schema}.{self.name}" if self.schema else self.name


def quoted(name: str) -> str:
    """An identifier, whatever is in it."""
    return '"' + name.replace('"', '""') + '"'


@dataclass(frozen=True, slots=True)
class Column:
    """`type` as PostgreSQL calls it inside, like int4. `counts`: a sequence fills it. `is_now`: when nothing else does,
    the beginning of the transaction fills it.
    """

    name: str
    type: str
    is_required: bool = False
    counts: bool = False
    is_now: bool = False
    is_indexed: bool = False
    is_unique: bool = False
    is_primary: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """`name` is quoted, with its schema."""

    name: str
    columns: Mapping[str, Column]

    def told(self) -> str:
        """Its columns in words, bounded."""
        named = [f"{column.name} {column.type}" for column in self.columns.values()]
        return ", ".join(named[:40]) + (", …" if len(named) > 40 else "") or "none"


async def look_up(connection: Connection, name: TableName) -> Table:
    """Raises Misconfigured for what is not there, cannot be read, or is no ordinary table."""
    try:
        oid = await connection.fetchval(_FIND, name.quoted)
    except asyncpg.InsufficientPrivilegeError:
        raise _refused(f"This user may not look into the schema {name.schema}: grant usage on it.") from None
    if oid is None:
        raise _refused(f"There is no table {name} there{await _remedy(connection, name)}.")
    row = await connection.fetchrow(_TABLE, oid)
    if row is None:
        raise _refused(f"The table {name} has just gone.")
    if wrong := _wrong(row):
        raise _refused(f"{name} {wrong}")
    return Table(row["quoted"], await _columns(connection, oid))


def _wrong(row: asyncpg.Record) -> str | None:
    match row["kind"]:
        case "r":
            pass
        case "v" | "m":
            return "is a view: what is written late cannot be noticed there. Name the table behind it."
        case "p":
            return "is partitioned: writers of a partition cannot be noticed there. Name each partition as a source."
        case "f":
            return "is a foreign table: name its own database as dsn."
        case _:
            return "is no table."
    if row["relhassubclass"]:
        return "has tables that inherit from it: writers of those cannot be noticed. Name each as a source."
    if not row["is_readable"]:
        return "cannot be read by this user: grant select on it."
    if row["is_filtered"]:
        return "has row security that hides rows from this user: give it BYPASSRLS, or use another one."
    return None


async def _remedy(connection: Connection, name: TableName) -> str:
    """Names without quotes are in lower case, wherever they were written otherwise."""
    low = TableName(name.schema.lower() if name.schema else None, name.name.lower())
    if low != name and await connection.fetchval(_FIND, low.quoted) is not None:
        return f", but one that is called {low}"
    return "" if name.schema else " that the search path finds; name its schema, too, as in schema.table"


async def _columns(connection: Connection, oid: int) -> dict[str, Column]:
    indexes = await connection.fetch(_INDEXES, oid)
    first = {row["first"] for row in indexes}
    unique = {row["first"] for row in indexes if row["is_unique"]}
    primary = {row["first"] for row in indexes if row["is_primary"] and row["is_unique"]}
    return {
        row["name"]: Column(
            row["name"],
            row["type"],
            row["attnotnull"],
            row["counts"],
            row["is_now"],
            row["name"] in first,
            row["name"] in unique,
            row["name"] in primary,
        )
        for row in await connection.fetch(_COLUMNS, oid)
    }


def _refused(why: str) -> Misconfigured:
    return Misconfigured("source_table", why)
