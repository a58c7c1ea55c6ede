"""The door to more than one PostgreSQL stays open: the log unit leads every key with the id of its stream or replica,
nothing references it or from it, and no statement asks for its rows and others' at once (docs/decisions/0006)."""

import ast
import re
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path

import asyncpg
import pytest

APP = Path(__file__).parents[2] / "app"

# Each table of the unit, and what every key of it begins with.
UNIT = {"replicas": "id", "replica_beats": "replica_id", "streaming_sessions": "id", "streaming_events": "stream_id"}

# Statements that ask for rows of the unit and of others at once, by module and constant, each with the reason.
_RECOUNT = "What unfinished runs have cost is left out of a recount; elsewhere, their ids would be asked for first."
_ERRORS = "Errors name their stream only; elsewhere, the ids of a user's streams would be asked for first."
ALLOWED = {
    **{("conversations/recount.py", name): _RECOUNT for name in ("COUNTED", "_DIFFERING", "_WRITE")},
    ("conversations/tally.py", "_COUNTED"): _RECOUNT,
    ("flows/erasure.py", "_ERRORS"): _ERRORS,
}

_STATEMENT = re.compile(r"\s*(with|select|insert|update|delete|merge|lock|truncate|copy)\b", re.IGNORECASE)


@pytest.fixture
async def connection(database: str) -> AsyncGenerator[asyncpg.Connection, None]:
    connection = await asyncpg.connect(database)
    yield connection
    await connection.close()


async def _unit(connection: asyncpg.Connection) -> dict[int, str]:
    """The unit's tables by their oid, with the partitions of each under its name."""
    rows = await connection.fetch(
        "select c.oid, t.name from unnest($1::text[]) t(name), pg_partition_tree(t.name::regclass) p join pg_class c"
        " on c.oid = p.relid union select t.name::regclass, t.name from unnest($1::text[]) t(name)",
        [*UNIT],
    )
    return {row["oid"]: row["name"] for row in rows}


async def test_every_key_begins_with_the_stream_or_the_replica(connection: asyncpg.Connection) -> None:
    await connection.execute("create table p partition of streaming_events for values from (minvalue) to (maxvalue)")
    unit = await _unit(connection)
    rows = await connection.fetch(
        "select i.indrelid, a.attname from pg_index i"
        " left join pg_attribute a on a.attrelid = i.indrelid and a.attnum = i.indkey[0]"
        " where i.indrelid = any($1::oid[]) and i.indisunique",
        [*unit],
    )
    assert {(unit[row["indrelid"]], row["attname"]) for row in rows} == set(UNIT.items())
    assert len(rows) == len(UNIT) + 1  # and the partition's


async def test_nothing_references_the_unit_or_from_it_and_nothing_happens_behind_its_back(
    connection: asyncpg.Connection,
) -> None:
    unit = [*await _unit(connection)]
    about = "conrelid = any($1::oid[]) or confrelid = any($1::oid[])"
    assert not await connection.fetch(f"select conname from pg_constraint where contype = 'f' and ({about})", unit)
    assert not await connection.fetch("select tgname from pg_trigger where tgrelid = any($1::oid[])", unit)
    rewritten = "select ev_class::regclass from pg_rewrite r join pg_depend d on d.objid = r.oid"
    assert not await connection.fetch(f"{rewritten} where d.refobjid = any($1::oid[])", unit)


async def test_no_statement_asks_for_rows_of_the_unit_and_of_others_at_once(connection: asyncpg.Connection) -> None:
    rows = await connection.fetch("select relname from pg_class where relnamespace = 'public'::regnamespace")
    others = {row["relname"] for row in rows} - UNIT.keys()
    of_the_unit, mixed = 0, {}
    for path in sorted(APP.rglob("*.py")):
        for place, text in _statements(path.read_text()):
            words = set(re.findall(r"\w+", text))
            of_the_unit += bool(words & UNIT.keys())
            if words & UNIT.keys() and words & others:
                mixed[path.relative_to(APP).as_posix(), place] = words & others
    assert mixed.keys() == ALLOWED.keys(), mixed
    assert of_the_unit > 20  # they are found at all


def test_statements_are_found_wherever_they_stand() -> None:
    source = """
_PART = "join chats c on true"
_JOINED = f"select * from streaming_sessions s {_PART}"
def read(pool):
    "Select, as this docstring says, is no statement about chats."
    return pool.fetch("with a as (select 1) " "update chats set x = 1", f"select {1} from {_JOINED}")
"""
    assert [*_statements(source)] == [
        ("_JOINED", "select * from streaming_sessions s join chats c on true"),
        ("line 6", "with a as (select 1) update chats set x = 1"),
        ("line 6", "select ? from select * from streaming_sessions s join chats c on true"),
    ]


def _statements(source: str) -> Iterator[tuple[str, str]]:
    """The SQL of a module, each with the constant's name or the line that it stands in."""
    finder = _Finder()
    finder.visit(ast.parse(source))
    return ((place, text) for place, text in finder.texts if _STATEMENT.match(text))


class _Finder(ast.NodeVisitor):
    """Every string of a module but docstrings; in f-strings the module's constants stand for their names."""

    def __init__(self) -> None:
        self.texts: list[tuple[str, str]] = []
        self._constants: dict[str, str] = {}

    def visit_Assign(self, node: ast.Assign) -> None:
        match node:
            case ast.Assign(targets=[ast.Name(name)], value=ast.Constant(str()) | ast.JoinedStr() as value):
                self._constants[name] = self._text(value)
                self.texts.append((name, self._constants[name]))
            case _:
                self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):  # which would be a docstring
            self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        self.texts.append((f"line {node.lineno}", self._text(node)))

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        self.texts.append((f"line {node.lineno}", self._text(node)))

    def _text(self, node: ast.expr) -> str:
        match node:
            case ast.Constant(str(text)):
                return text
            case ast.JoinedStr(values):
                return "".join(map(self._text, values))
            case ast.FormattedValue(ast.Name(name)):
                return self._constants.get(name, "?")
            case _:
                return "?"
