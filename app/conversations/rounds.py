"""The table `conversation_rounds`: how far the index has been compared with what it is made of, and what was found."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import orjson

from app.postgres import Connection, Pool

# What was compared so lately is left alone.
_REST = "12 hours"

_ALL = f"""
select source, place, ended_at, compared, drift, error_code, error,
    place is not null or ended_at is null or ended_at < parley_now() - interval '{_REST}' as is_due
from conversation_rounds
"""
_BEGIN = """
insert into conversation_rounds as r (source, place, began_at) values ($1, '{}', parley_now())
on conflict (source) do update set place = '{}', began_at = excluded.began_at, compared = 0, drift = 0
where r.place is null
"""
_MOVE = """
update conversation_rounds set place = $2, compared = compared + $3, drift = drift + $4,
    error_code = null, error = null,
    ended_at = case when $2::jsonb is null then parley_now() else ended_at end
where source = $1
"""
_FAIL = """
insert into conversation_rounds (source, error_code, error) values ($1, $2, $3)
on conflict (source) do update set error_code = excluded.error_code, error = excluded.error
"""
_FORGET = "delete from conversation_rounds where not source = any($1::text[])"

# Where a round is, as whoever compares has written it down; empty at its beginning.
Place = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Round:
    """Of one source. `place` is None where none is under way; `drift` counts conversations that were put right."""

    source: str
    place: Place | None = None
    ended_at: datetime | None = None
    compared: int = 0
    drift: int = 0
    error_code: str | None = None
    error: str | None = None
    is_due: bool = True


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of a round: where it has ended, None at the round's end, and how many were compared and put right.

    `unsure` are those that could not be compared, or not be put right, this time.
    """

    place: Place | None
    compared: int = 0
    drift: int = 0
    unsure: int = 0


async def rounds(connection: Connection | Pool) -> dict[str, Round]:
    """By source. Bounded by the sources."""
    return {
        row["source"]: Round(**{**row, "place": None if row["place"] is None else orjson.loads(row["place"])})
        for row in await connection.fetch(_ALL)
    }


async def begin(connection: Connection | Pool, source: str) -> None:
    """Where one is under way, it goes on."""
    await connection.execute(_BEGIN, source)


async def move(connection: Connection | Pool, source: str, piece: Piece) -> None:
    """The next one goes on from where this one has ended."""
    place = None if piece.place is None else orjson.dumps(piece.place).decode()
    await connection.execute(_MOVE, source, place, piece.compared, piece.drift)


async def fail(connection: Connection | Pool, source: str, code: str, detail: str) -> None:
    await connection.execute(_FAIL, source, code, detail)


async def forget_others(connection: Connection | Pool, sources: list[str]) -> None:
    """What is known of sources that are none any more."""
    await connection.execute(_FORGET, sources)
