"""One statement out of what several rooms write, so that all of it costs one round trip to the database."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import asyncpg

from app.postgres import Connection

_VALUE = re.compile(r"\$(\d+)")


@dataclass(frozen=True, slots=True)
class Part:
    """WITH queries, with commas between them and with $1, $2 … for the part's own values.

    They see none of what the others write but by the name of a query of a part before them.
    """

    sql: str
    values: tuple[Any, ...]


async def fetch_together(connection: Connection, parts: Sequence[Part], select: str) -> asyncpg.Record:
    """Run all parts as one statement; the one row of `select`, which may name their queries."""
    text = _joined(tuple(part.sql for part in parts), tuple(len(part.values) for part in parts), select)
    row = await connection.fetchrow(text, *(value for part in parts for value in part.values))
    assert row is not None
    return row


@lru_cache(maxsize=64)
def _joined(parts: tuple[str, ...], counts: tuple[int, ...], select: str) -> str:
    """Each part's values count on from those before it. Kept, as asyncpg knows prepared statements by their text."""
    firsts = accumulate(counts[:-1], initial=0)
    return f"with {', '.join(map(_from, parts, firsts))} {select}"


def _from(sql: str, first: int) -> str:
    return _VALUE.sub(lambda value: f"${int(value[1]) + first}", sql)
