"""Which kind a source's table is: by its columns in the catalogue, then by a look at its newest rows."""

from collections import Counter
from collections.abc import Mapping, Sequence

import asyncpg

from app.conversations.sources import flowise, langchain, litellm, proxy
from app.conversations.sources.parts import Found, Lacking, Part, find
from app.conversations.sources.shape import Shape, Skipped
from app.conversations.sources.source import Kind, Source
from app.conversations.sources.table import Table, TableName, look_up
from app.errors import Misconfigured
from app.postgres import Connection

# Rows that are looked at to tell what wrote them.
_LOOKED_AT = 50
# In this order where the kind is to be found: who asks for more columns first. `langchain` is all three of LangChain's.
_PARTS: Mapping[Kind, Mapping[str, Part]] = {
    "litellm": litellm.PARTS,
    "flowise": flowise.PARTS,
    "langchain": langchain.PARTS,
    "proxy": proxy.PARTS,
}
# What the configuration may name a column for.
PART_NAMES = frozenset(name for parts in _PARTS.values() for name in parts)


async def recognise(connection: Connection, source: Source) -> Shape:
    """The shape of a source's table. Raises Misconfigured saying what was seen and what to set."""
    try:
        name = TableName.of(source.table)
    except ValueError as error:
        raise Misconfigured("source_table", f"The table of {source.id} {error}.") from None
    table = await look_up(connection, name)
    if source.kind != "auto":
        return _as(source.kind, table, source)
    shape = _likeliest(table, source)
    return await _confirmed(connection, shape, source)


async def newest(connection: Connection, shape: Shape, rows: int) -> list[asyncpg.Record]:
    """The values of `reads` of the newest rows, or of any where neither key nor indexed time say which are new."""
    return await connection.fetch(newest_first(shape), rows)


def newest_first(shape: Shape) -> str:
    """The statement: by the column itself, as what is read may bear its name, and has no index."""
    order = ""
    if shape.key.is_serial:
        order = f"order by parley_row.{shape.key.column} desc"
    elif shape.time is not None and shape.time.is_indexed:
        order = f"order by parley_row.{shape.time.column} desc"
    return f"select {', '.join(shape.reads)} from {shape.table} parley_row {order} limit $1"


def _as(kind: Kind, table: Table, source: Source) -> Shape:
    try:
        return _shape(kind, find(table, parts_of(kind), source.columns), source)
    except Lacking as error:
        raise Misconfigured(
            "source_not_recognised",
            f"{source.table} is not of the kind {kind}: {error}. Its columns are {table.told()}. "
            "Say in `columns` which is which, or set another kind.",
        ) from None


def _likeliest(table: Table, source: Source) -> Shape:
    lacking = {}
    for kind, parts in _PARTS.items():
        try:
            return _shape(kind, find(table, parts, source.columns), source)
        except Lacking as error:
            lacking[kind] = str(error)
    raise Misconfigured(
        "source_not_recognised",
        f"{source.table} is of no known kind; its columns are {table.told()}. "
        + " ".join(f"As {kind}: {why}." for kind, why in lacking.items())
        + " Set `kind`, and say in `columns` which is which.",
    )


def parts_of(kind: Kind) -> Mapping[str, Part]:
    """What tables of a kind may have."""
    return _PARTS[_family(kind)]


def _family(kind: Kind) -> Kind:
    return "langchain" if kind in ("n8n", "langchain-postgres") else kind


def _shape(kind: Kind, found: Found, source: Source) -> Shape:
    match kind:
        case "litellm":
            return litellm.litellm(found)
        case "flowise":
            return flowise.flowise(found)
        case "proxy":
            return proxy.proxy(found, path=[part for part in source.conversation.split(".") if part])
        case _:
            return langchain.langchain(kind, found)


async def _confirmed(connection: Connection, shape: Shape, source: Source) -> Shape:
    """As the rows say; stock tables of the others are told by their columns alone."""
    if shape.kind not in ("langchain", "proxy"):
        return shape
    rows = await newest(connection, shape, _LOOKED_AT)
    reasons: Counter[str] = Counter(said.reason for row in rows if isinstance(said := shape.said(row), Skipped))
    if rows and reasons.total() == len(rows):
        raise Misconfigured("source_not_recognised", _not_understood(shape, source, reasons))
    return _named(shape, rows) if isinstance(shape, langchain.LangChain) else shape


def _named(shape: langchain.LangChain, rows: Sequence[asyncpg.Record]) -> Shape:
    return langchain.named(shape, [row[2] for row in rows])


def _not_understood(shape: Shape, source: Source, reasons: Counter[str]) -> str:
    told = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    what = (
        f"{source.table} has the columns of the kind {shape.kind}, and none of its newest rows is understood ({told})."
    )
    if shape.kind == "proxy":
        return (
            f"{what} Say in `conversation` where the conversation's id is in the JSON, as in metadata.chat_id, or in "
            "`columns` which column is the session."
        )
    return f"{what} Say in `columns` which is the message, or set another kind; a kind that is set is not doubted."
