"""The table `conversation_source_state`: how far each source has been read, and what became of its last passes."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import asyncpg
import orjson

from app.conversations.ranges import Ranges
from app.conversations.watermark import Mark
from app.errors import Conflict
from app.postgres import Connection, Pool

_LOAD = """
select s.version, s.settled, s.seen, s.marks, s.sweep, s.skipped, i.is_there
from conversation_index i left join conversation_source_state s on s.source = $1
"""
# Not from 0: one that was taken away and made anew must not be taken for the one before.
_MAKE = """
insert into conversation_source_state (source, version) values ($1, floor(random() * 1e15)::bigint)
on conflict do nothing
"""
_SWAP = """
update conversation_source_state set version = version + 1, settled = $3, seen = $4, marks = $5, sweep = $6,
    rows = rows + $7, skipped = $8
where source = $1 and version = $2 returning 1
"""
_RECORD = """
insert into conversation_source_state as s (
    source, version, passes, last_discovered_at, last_session_count, last_rows, last_seconds, last_complete_at,
    failures, error_code, error)
values ($1, floor(random() * 1e15)::bigint, 1, parley_now(), $2, $3, $4, case when $5 then parley_now() end,
    ($6::text is not null)::int, $6, $7)
on conflict (source) do update set
    passes = s.passes + 1, last_discovered_at = excluded.last_discovered_at,
    last_session_count = excluded.last_session_count, last_rows = excluded.last_rows,
    last_seconds = excluded.last_seconds, last_complete_at = coalesce(excluded.last_complete_at, s.last_complete_at),
    failures = case when excluded.failures = 0 then 0 else s.failures + 1 end,
    error_code = excluded.error_code, error = excluded.error
"""


class Outrun(Exception):
    """Somebody else has read on from the same place, or written the table anew: nothing of this was counted."""


@dataclass(frozen=True, slots=True)
class State:
    """Rows up to `settled` and those in `seen` are counted; nobody can commit one up to `settled` any more.

    `sweep` is where a table is read whose keys no sequence gives out. `skipped` counts rows by the reason.
    """

    version: int
    settled: int
    seen: Ranges
    marks: list[Mark]
    sweep: dict[str, Any] = field(default_factory=dict)
    skipped: Mapping[str, int] = field(default_factory=dict)

    def has(self, key: int) -> bool:
        """Whether a row with this key is counted."""
        return key <= self.settled or key in self.seen


async def load(connection: Connection | Pool, source: str) -> State:
    """Of a source that was never read, too. Raises Conflict where there is no index to count into.

    Whoever deletes the index takes the states away in the same transaction, and outruns what is under way.
    """
    row = await connection.fetchrow(_LOAD, source)
    if row is None or not row["is_there"]:
        raise Conflict("index_missing", "There is no index: POST /api/sync/init and /api/sync/sync make one.")
    if row["version"] is None:
        await connection.execute(_MAKE, source)
        return await load(connection, source)
    spans = [(part.lower, part.upper - 1) for part in row["seen"]]
    marks = [Mark.from_json(mark) for mark in orjson.loads(row["marks"])]
    return State(
        *(row["version"], row["settled"], Ranges(spans), marks),
        *(orjson.loads(row["sweep"]), orjson.loads(row["skipped"])),
    )


async def swap(connection: Connection, source: str, new: State, *, rows: int, skipped: Mapping[str, int]) -> None:
    """Put a new state in the place of the version it was made from, in the transaction that counts the rows.

    Raises Outrun where that version is no longer there. The row stays locked: the others wait, and are outrun.
    """
    seen = [asyncpg.Range(first, last + 1) for first, last in new.seen.spans]
    swapped = await connection.fetchval(
        _SWAP,
        *(source, new.version, new.settled, seen, _json([mark.to_json() for mark in new.marks]), _json(new.sweep)),
        *(rows, _json(Counter(new.skipped) + Counter(skipped))),
    )
    if swapped is None:
        raise Outrun


def _json(value: object) -> str:
    return orjson.dumps(value).decode()


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one pass over a source. `is_complete`: it came to the end."""

    rows: int
    sessions: int
    seconds: float
    is_complete: bool
    error_code: str | None = None
    error: str | None = None


async def record(connection: Connection, source: str, outcome: Outcome) -> None:
    """For operators only, so nobody waits until it is on the disk."""
    async with connection.transaction():
        await connection.execute("set local synchronous_commit = off")
        await connection.execute(
            _RECORD,
            *(source, outcome.sessions, outcome.rows, outcome.seconds, outcome.is_complete),
            *(outcome.error_code, outcome.error),
        )


@dataclass(frozen=True, slots=True)
class Told:
    """What operators are told of a source, as the view `crew_discovery_state` says it. Ids are watermarks."""

    crew_code: str
    source: str
    client: str
    is_enabled: bool
    last_discovered_at: datetime | None
    last_session_count: int
    last_rows: int
    last_seconds: float
    last_complete_at: datetime | None
    lag_seconds: float | None
    conversation_count: int
    row_count: int
    skipped: Mapping[str, int]
    consecutive_failures: int
    last_error_code: str | None
    last_error: str | None
    watermark: int | None
    reconciled_at: datetime | None
    drift: int


_TOLD = f"select {', '.join(Told.__dataclass_fields__)} from crew_discovery_state order by source"


async def told(connection: Connection | Pool) -> list[Told]:
    """Of every source that is configured."""
    return [Told(**{**row, "skipped": orjson.loads(row["skipped"])}) for row in await connection.fetch(_TOLD)]
