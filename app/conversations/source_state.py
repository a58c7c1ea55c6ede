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
from app.postgres import Connection, Pool

_LOAD = """
select version, settled, seen, marks, sweep, skipped from conversation_source_state where source = $1
"""
_MAKE = "insert into conversation_source_state (source) values ($1) on conflict do nothing"
_SWAP = """
update conversation_source_state set version = version + 1, settled = $3, seen = $4, marks = $5, sweep = $6,
    rows = rows + $7, skipped = $8
where source = $1 and version = $2 returning 1
"""
_RECORD = """
update conversation_source_state set passes = passes + 1, last_discovered_at = parley_now(), last_session_count = $2,
    last_rows = $3, last_seconds = $4, failures = case when $6::text is null then 0 else failures + 1 end,
    error_code = $6, error = $7, last_complete_at = case when $5 then parley_now() else last_complete_at end
where source = $1
"""


class Outrun(Exception):
    """Somebody else has read on from the same place: nothing of this was counted."""


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
    """Of a source that was never read, too."""
    if (row := await connection.fetchrow(_LOAD, source)) is None:
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
    """What operators are told of a source."""

    source: str
    rows: int
    skipped: Mapping[str, int]
    conversations: int
    watermark: int
    last_discovered_at: datetime | None
    last_complete_at: datetime | None
    lag_s: float | None
    last_sessions: int
    last_rows: int
    last_seconds: float
    failures: int
    error_code: str | None
    error: str | None
    drift: int


_ALL = """
select source, row_count, skipped, conversation_count, watermark, last_discovered_at, last_complete_at, lag_seconds,
    last_session_count, last_rows, last_seconds, consecutive_failures, last_error_code, last_error, drift
from crew_discovery_state order by source
"""


async def all_states(connection: Connection | Pool) -> list[Told]:
    """Bounded by the sources that were ever configured."""
    rows = await connection.fetch(_ALL)
    return [Told(row[0], row[1], orjson.loads(row[2]), *list(row.values())[3:]) for row in rows]
