"""The table `api_keys`, and what a replica remembers of it. A key is `parley_ID_SECRET`; its SHA-256 is stored.

The id is no secret. A plain hash is enough for 256 random bits: nobody tries them all.
"""

import asyncio
import hmac
import re
import secrets
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from time import monotonic
from typing import TypeVar

import asyncpg

from app.access.principal import UNLIMITED, Daily, Principal, Scope
from app.errors import Misconfigured, Unauthorized, Unavailable
from app.postgres import ACQUIRE_S, AWAY, CONFLICT, Connection, Pool, prompt_connection, why

T = TypeVar("T")

PREFIX = "parley_"
_SHAPE = re.compile(rf"{PREFIX}([0-9a-f]{{16}})_[0-9a-f]{{64}}")

_CREATE = """
insert into api_keys (id, hash, name, scopes, daily_messages, daily_tokens) values ($1, $2, $3, $4, $5, $6)
"""
_ALL = """
select id, name, scopes, created_at, used_at, revoked_at, daily_messages, daily_tokens from api_keys
order by created_at, id
"""
_REVOKE = "update api_keys set revoked_at = coalesce(revoked_at, now()) where id = $1 returning 1"
# An hour is close enough for people, and keeps requests from writing.
_LOOK = """
select hash, scopes, daily_messages, daily_tokens, used_at is null or used_at < now() - interval '1 hour' as unused
from api_keys
where id = $1 and revoked_at is null
"""
# Without waiting for whoever notes it at the same moment.
_USED = """
update api_keys set used_at = now() where id = (select id from api_keys where id = $1 for update skip locked)
"""

# How long a row is believed, in seconds: a revoked key is refused within 10 (A6).
_BELIEVED_S = 5.0
# How many keys are remembered, and as many ids that are none.
_REMEMBERED = 1000
# Looks into the table at once: strangers who try keys leave connections to everybody else. As many again are for keys
# that were good a moment ago, so that no number of guesses delays those who have one.
_AT_ONCE = 2


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A row without its hash."""

    id: str
    name: str
    scopes: Sequence[str]
    created_at: datetime
    used_at: datetime | None
    revoked_at: datetime | None
    daily_messages: int | None
    daily_tokens: int | None


async def create(connection: Connection, name: str, scopes: Sequence[Scope], *, daily: Daily = UNLIMITED) -> str:
    """A new key, which is known nowhere else. `daily`: quotas of its own."""
    key_id = secrets.token_hex(8)
    key = f"{PREFIX}{key_id}_{secrets.token_hex(32)}"
    await connection.execute(_CREATE, key_id, _hash(key), name, sorted(set(scopes)), daily.messages, daily.tokens)
    return key


async def all_keys(connection: Connection) -> list[ApiKey]:
    """Revoked ones, too, oldest first."""
    return [ApiKey(**row) for row in await connection.fetch(_ALL)]


async def revoke(connection: Connection, key_id: str) -> str:
    """Any number of times; returns the id. Raises Misconfigured for an unknown one."""
    # Whoever pastes the whole key means it, too.
    matched = _SHAPE.fullmatch(key_id)
    found = matched[1] if matched else key_id
    if not await connection.fetchval(_REVOKE, found):
        raise Misconfigured("key_missing", "No API key has this id; `parley keys list` shows them all.")
    return found


def _hash(key: str) -> bytes:
    return sha256(key.encode()).digest()


@dataclass(frozen=True, slots=True)
class _Known:
    hash: bytes
    principal: Principal
    until: float


class Keys:
    """Who holds a key. Each replica reads a key's row again every few seconds while it is used."""

    def __init__(self, pool: Pool, *, believed_s: float = _BELIEVED_S, remembered: int = _REMEMBERED) -> None:
        self._pool = pool
        self._believed_s = believed_s
        self._remembered = remembered
        self._known: OrderedDict[str, _Known] = OrderedDict()
        # Apart, so that strangers who try ids do not push out the keys that are used.
        self._unknown: OrderedDict[str, float] = OrderedDict()
        self._refreshes = asyncio.Semaphore(_AT_ONCE)
        self._guesses = asyncio.Semaphore(_AT_ONCE)

    async def principal(self, key: str) -> Principal:
        """Raises Unauthorized for what is no key, or a revoked one, and Unavailable while that cannot be looked up."""
        matched = _SHAPE.fullmatch(key)
        known = await self._find(matched[1]) if matched else None
        if known is None or not hmac.compare_digest(known.hash, _hash(key)):
            raise Unauthorized("credentials_invalid", "These credentials are unknown, or the key was revoked.")
        return known.principal

    async def _find(self, key_id: str) -> _Known | None:
        if not self._is_fresh(key_id):
            try:
                await self._look(key_id)
            except AWAY as error:
                detail = f"Keys cannot be checked, the database is away: {why(error)}"
                raise Unavailable("database_unavailable", detail, retry_after=2) from error
            except asyncpg.UndefinedTableError:
                detail = "Keys cannot be checked, the database lacks migrations: run `parley migrate`."
                raise Unavailable("starting", detail, retry_after=2) from None
        return self._known.get(key_id)

    def _is_fresh(self, key_id: str) -> bool:
        """Whether what is remembered of an id, if only that it is none, may still be believed."""
        known = self._known.get(key_id)
        return (self._unknown.get(key_id, 0.0) if known is None else known.until) > monotonic()

    async def _look(self, key_id: str) -> None:
        turns = self._refreshes if key_id in self._known else self._guesses
        async with asyncio.timeout(ACQUIRE_S), turns:
            if self._is_fresh(key_id):  # somebody else has looked meanwhile
                return
            until = monotonic() + self._believed_s
            async with prompt_connection(self._pool) as connection:
                row = await connection.fetchrow(_LOOK, key_id)
                if row is not None and row["unused"]:
                    # No reason to refuse anybody, should it fail: on a full disk reads still work.
                    with suppress(*AWAY, *CONFLICT):
                        await connection.execute(_USED, key_id)
        self._known.pop(key_id, None)
        self._unknown.pop(key_id, None)
        if row is None:
            _remember(self._unknown, key_id, until, most=self._remembered)
        else:
            daily = Daily(row["daily_messages"], row["daily_tokens"])
            principal = Principal("key", f"key:{key_id}", frozenset(row["scopes"]), daily=daily)
            _remember(self._known, key_id, _Known(row["hash"], principal, until), most=self._remembered)


def _remember(memory: OrderedDict[str, T], key_id: str, value: T, *, most: int) -> None:
    memory[key_id] = value
    if len(memory) > most:
        memory.popitem(last=False)
