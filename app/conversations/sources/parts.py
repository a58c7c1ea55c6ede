"""The columns of a table that a shape reads, found by their stock names or as the configuration names them."""

from collections.abc import Mapping
from dataclasses import dataclass

from app.conversations.sources.shape import LONGEST, Key, Meaning, Session, Time
from app.conversations.sources.table import Column, Table, quoted

_INTEGERS = frozenset({"int2", "int4", "int8"})
TEXTS = frozenset({"text", "varchar", "bpchar", "citext"})
IDS = TEXTS | _INTEGERS | {"uuid"}
JSONS = TEXTS | {"json", "jsonb"}
_MOMENTS = frozenset({"timestamptz", "timestamp", "date"})
TIMES = _MOMENTS | _INTEGERS | TEXTS
# Characters of an id or a name that are read: one more than fits says that it is too long.
_NAME = 1025


@dataclass(frozen=True, slots=True)
class Part:
    """What a shape reads from one column: how it may be called, in any case and without underscores, and its types."""

    names: tuple[str, ...]
    types: frozenset[str]
    is_needed: bool = True


KEY = Part(("id",), IDS)
# What any table may have beside its own columns.
EXTRAS: Mapping[str, Part] = {
    "username": Part(("username", "userid"), IDS, is_needed=False),
    "client_ip": Part(("clientip",), TEXTS | {"inet"}, is_needed=False),
    "chatbot": Part(("chatbotid",), IDS, is_needed=False),
}


class Lacking(Exception):
    """What a table would need to have to be of a shape, in words."""


@dataclass(frozen=True, slots=True)
class Found:
    """A table, and which of its columns is which part."""

    table: Table
    columns: Mapping[str, Column]

    @property
    def key(self) -> Key:
        key = self.columns["key"]
        name = quoted(key.name)
        return Key(name, key.counts and key.type in _INTEGERS, f"{name} = any($1::text[]::{key.type}[])")

    def key_read(self) -> str:
        return f"{self.key.column}::{'bigint' if self.key.is_serial else 'text'}"

    def text(self, part: str, most: int = _NAME) -> str:
        """An expression for a column as text, or for null."""
        column = self.columns.get(part)
        if column is None:
            return "null::text"
        if column.type == "inet":
            return f"host({quoted(column.name)})"
        return f"left({quoted(column.name)}::text, {most})"

    def json(self, part: str) -> str:
        return self.text(part, LONGEST + 1)

    def number(self, part: str) -> str:
        column = self.columns.get(part)
        return f"{quoted(column.name)}::bigint" if column else "null::bigint"

    def moment(self, part: str, *, zone: str | None = None) -> str:
        """A timestamptz, or the text of a column that holds times as text. `zone`: of times without one."""
        column = self.columns.get(part)
        if column is None:
            return "null::timestamptz"
        name = quoted(column.name)
        if column.type in TEXTS:
            return f"left({name}::text, 64)"
        if column.type in _INTEGERS:
            return (
                f"case when {name} between 0 and 99999999999 then to_timestamp({name}) "
                f"when {name} between 100000000000 and 99999999999999 then to_timestamp({name} / 1000.0) end"
            )
        stamp = f"({name} at time zone '{zone}')" if zone and column.type == "timestamp" else f"{name}::timestamptz"
        return f"case when {name} >= '1970-01-01' and {name} < '9999-01-01' then {stamp} end"

    def time(self, *, zone: str | None = None, means: Meaning | None = None) -> Time | None:
        """Nothing for times as text: they cannot be compared."""
        column = self.columns.get("time")
        if column is None or column.type in TEXTS:
            return None
        meaning = means or ("transaction" if column.is_now else "written")
        return Time(quoted(column.name), self.moment("time", zone=zone), meaning, column.is_indexed)

    def session(self) -> Session | None:
        column = self.columns.get("session")
        if column is None:
            return None
        name = quoted(column.name)
        return Session(name, column.type, f"{name} = $1::text::{column.type}", column.is_indexed)


def find(table: Table, parts: Mapping[str, Part], given: Mapping[str, str]) -> Found:
    """Which column is which part. `given` names some of them. Raises Lacking."""
    if unknown := sorted(given.keys() - parts.keys()):
        raise Lacking(f"it has no part called {', '.join(unknown)} (there are {', '.join(parts)})")
    if absent := sorted({name for name in given.values() if name not in table.columns}):
        raise Lacking(f"the table has no column {', '.join(absent)}")
    columns = {part: _column(table, part, of, given.get(part)) for part, of in parts.items()}
    found = Found(table, {part: column for part, column in columns.items() if column})
    _check_key(found)
    return found


def _column(table: Table, name: str, part: Part, given: str | None) -> Column | None:
    if given is not None:
        column = table.columns[given]
        if column.type not in part.types:
            raise Lacking(f"the column {given} is {column.type}, and {name} must be one of {_listed(part.types)}")
        return column
    stock = _stock(table, name, part)
    if stock is None and part.is_needed:
        raise Lacking(f"it has no column for {name} (called {' or '.join(part.names)}, {_listed(part.types)})")
    return stock


def _stock(table: Table, name: str, part: Part) -> Column | None:
    if name == "key" and (primary := [column for column in table.columns.values() if column.is_primary]):
        return primary[0] if primary[0].type in part.types else None
    for stock in part.names:
        for column in table.columns.values():
            if _plain(column.name) == stock and column.type in part.types:
                return column
    return None


def _plain(name: str) -> str:
    return name.lower().replace("_", "")


def _listed(types: frozenset[str]) -> str:
    return ", ".join(sorted(types))


def _check_key(found: Found) -> None:
    key = found.columns["key"]
    if not (key.is_unique and key.is_required):
        raise Lacking(
            f"its column {key.name} is no key: one column must tell rows apart, with a unique index and not null"
        )
