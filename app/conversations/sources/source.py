"""The table `conversation_sources`: which foreign tables are read, as they are configured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import asyncpg
import orjson

from app.access.audit import Actor, note
from app.errors import Misconfigured
from app.postgres import Connection, Pool

Kind = Literal["n8n", "langchain", "langchain-postgres", "flowise", "litellm", "proxy"]
Wanted = Literal["auto", "n8n", "langchain", "langchain-postgres", "flowise", "litellm", "proxy"]

_LOCK = "lock table conversation_sources in share row exclusive mode"
_ALL = """
select id, version, code, client, dsn, table_name, kind, columns, conversation, is_enabled
from conversation_sources order by id
"""
_PUT = """
insert into conversation_sources as s (id, code, client, dsn, table_name, kind, columns, conversation, is_enabled)
values ($1, $2, $3, $4, $5, $6, $7, $8, $9)
on conflict (id) do update set
    version = s.version + ((s.dsn, s.table_name, s.kind, s.columns, s.conversation) is distinct from
        (excluded.dsn, excluded.table_name, excluded.kind, excluded.columns, excluded.conversation))::int,
    code = excluded.code, client = excluded.client, dsn = excluded.dsn, table_name = excluded.table_name,
    kind = excluded.kind, columns = excluded.columns, conversation = excluded.conversation,
    is_enabled = excluded.is_enabled, updated_at = parley_now()
"""
_REMOVE = "delete from conversation_sources where id = $1 returning 1"


@dataclass(frozen=True, slots=True)
class Source:
    """`dsn` is a reference, env:NAME or file:PATH, never the URL. `code` is what a webhook calls it.

    `columns`: which column is which part, where that is not recognised. `conversation`: where the conversation's id is
    in a proxy's JSON, with dots between names. `version` goes up when any of what is read changes.
    """

    id: str
    dsn: str
    table: str
    kind: Wanted = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    conversation: str = ""
    code: str = ""
    client: str = ""
    enabled: bool = True
    version: int = field(default=1, compare=False)

    def to_file(self) -> dict[str, Any]:
        """In the shape of a file, without what is not set."""
        given = {
            "dsn": self.dsn,
            "table": self.table,
            "kind": self.kind,
            "columns": dict(self.columns),
            "conversation": self.conversation,
            "code": self.code,
            "client": self.client,
            "enabled": self.enabled,
        }
        stock = {"kind": "auto", "columns": {}, "conversation": "", "code": self.id, "client": "", "enabled": True}
        return {name: value for name, value in given.items() if stock.get(name) != value}


@dataclass(frozen=True, slots=True)
class SourceChange:
    """What applying a source changes; before is None where it is new."""

    before: Source | None
    after: Source


async def all_sources(connection: Connection | Pool) -> list[Source]:
    """In the order of their ids, those that are switched off included."""
    return [_of(row) for row in await connection.fetch(_ALL)]


def _of(row: asyncpg.Record) -> Source:
    return Source(
        *(row["id"], row["dsn"], row["table_name"], row["kind"], orjson.loads(row["columns"]), row["conversation"]),
        *(row["code"], row["client"], row["is_enabled"], row["version"]),
    )


async def apply_sources(
    connection: Connection, wanted: Sequence[Source], *, dry_run: bool = False, actor: Actor | None = None
) -> list[SourceChange]:
    """Store every source that differs from what is there; all others stay. Raises Misconfigured for a code used twice.

    Noted in the audit as what `actor` did; None: it is nobody's doing.
    """
    async with connection.transaction():
        await connection.execute(_LOCK)
        there = {source.id: source for source in await all_sources(connection)}
        _refuse_same_codes(there | {source.id: source for source in wanted})
        changes = [SourceChange(there.get(source.id), source) for source in wanted if there.get(source.id) != source]
        if not dry_run:
            for change in changes:
                await _put(connection, change.after)
                if actor is not None:
                    await note(connection, actor, "source.apply", target=change.after.id, detail=change.after.table)
    return changes


def _refuse_same_codes(sources: Mapping[str, Source]) -> None:
    of_code: dict[str, str] = {}
    for source in sources.values():
        if (other := of_code.setdefault(source.code, source.id)) != source.id:
            detail = f"The sources {other} and {source.id} have the same code, {source.code}; a webhook must know one."
            raise Misconfigured("source_code", detail)


async def _put(connection: Connection, source: Source) -> None:
    columns = orjson.dumps(dict(source.columns), option=orjson.OPT_SORT_KEYS).decode()
    await connection.execute(
        _PUT,
        *(source.id, source.code, source.client, source.dsn, source.table, source.kind, columns),
        *(source.conversation, source.enabled),
    )


async def remove_source(connection: Connection, source_id: str) -> str:
    """Its conversations are taken out of the index later. Raises Misconfigured for an unknown id."""
    if not await connection.fetchval(_REMOVE, source_id):
        raise no_such_source(source_id, await all_sources(connection))
    return source_id


def no_such_source(source_id: str, there: Sequence[Source]) -> Misconfigured:
    known = ", ".join(source.id for source in there) or "none"
    return Misconfigured("source_missing", f"There is no source named {source_id!r} ({known}).")
