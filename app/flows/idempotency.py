"""A POST may be repeated (G11): its key, scoped to principal and route, remembers what the first one was told."""

from dataclasses import dataclass
from typing import Any

import asyncpg
import orjson

from app.errors import Invalid, Unavailable
from app.expiry import Rows
from app.postgres import Connection

# A parallel request with the same key waits here for the first one's commit and then finds the row taken.
_CLAIM = """
insert into idempotency_keys as k (principal, route, key, fingerprint, answer) values ($1, $2, $3, $4, '')
on conflict (principal, route, key) do update
    set fingerprint = excluded.fingerprint, answer = '', created_at = now()
    where k.created_at < now() - make_interval(secs => $5)
returning 1
"""
_FIND = "select fingerprint, answer from idempotency_keys where principal = $1 and route = $2 and key = $3"
_RECALL = f"{_FIND} and created_at >= now() - make_interval(secs => $4)"
_ANSWER = "update idempotency_keys set answer = $4 where principal = $1 and route = $2 and key = $3"


@dataclass(frozen=True, slots=True)
class Key:
    principal: str
    route: str
    key: str
    fingerprint: str


async def claim(connection: Connection, key: Key, *, remember_s: float) -> dict[str, Any] | None:
    """Take the key and return None, or return the answer it stands for. The first lock of its transaction.

    Raises Invalid where the key came with another body.
    """
    if await connection.fetchval(_CLAIM, key.principal, key.route, key.key, key.fingerprint, remember_s):
        return None
    row = await connection.fetchrow(_FIND, key.principal, key.route, key.key)
    if row is None:  # deleted as too old this very moment
        raise Unavailable(
            "database_busy", "The idempotency key has just expired; send the request again.", retry_after=1
        )
    return _answer(row, key)


async def recall(connection: Connection, key: Key, *, remember_s: float) -> dict[str, Any] | None:
    """The answer a key stands for, perhaps; only `claim` knows for certain that there is none. Raises Invalid as it."""
    row = await connection.fetchrow(_RECALL, key.principal, key.route, key.key, remember_s)
    return None if row is None else _answer(row, key)


def _answer(row: asyncpg.Record, key: Key) -> dict[str, Any]:
    if row["fingerprint"] != key.fingerprint:
        raise Invalid("idempotency_mismatch", "This idempotency key was used with another body; choose a new one.")
    answer: dict[str, Any] = orjson.loads(row["answer"])
    return answer


async def remember(connection: Connection, key: Key, answer: dict[str, Any]) -> None:
    """What every repetition will be told, in the transaction that claimed the key."""
    await connection.execute(_ANSWER, key.principal, key.route, key.key, orjson.dumps(answer).decode())


def keys_expiring(keep_s: float) -> Rows:
    """Keys that are too old to matter."""
    return Rows("idempotency_keys", "created_at", keep_s)
