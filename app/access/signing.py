"""The keys that sign stream tokens: those that a setting names, or else those of the table `signing_keys`.

The first signs, all of them are believed: a key can be replaced while tokens of the one before are still in use.
"""

import asyncio
import secrets
from collections.abc import Sequence
from time import monotonic

from app.access.stream_token import SigningKey
from app.errors import Misconfigured
from app.postgres import Connection, Pool, prompt_connection
from app.references import resolve
from app.settings import Settings

# Made once, by whoever is first; the others find it.
_MAKE = "insert into signing_keys (number, material) values (1, $1) on conflict do nothing"
_ALL = "select material from signing_keys order by number desc"
_ANY = "select exists (select from signing_keys)"
# The table has two rows at most.
_RENEW = """
with newest as (select coalesce(max(number), 0) as number from signing_keys),
     gone as (delete from signing_keys using newest where signing_keys.number < newest.number)
insert into signing_keys (number, material) select number + 1, $1 from newest
"""
_BYTES = 32
# Shorter ones would be passwords, and those can be guessed by whoever has a token.
_SHORTEST = 32
# Strangers with ids of keys that do not exist cause a look into the table this often at most, in seconds.
_LOOK_S = 5.0


def given_keys(settings: Settings) -> list[SigningKey]:
    """Those that PARLEY_SIGNING_KEY names. Raises Misconfigured for what is no reference, or too short a key."""
    references = [part.strip() for part in (settings.signing_key or "").split(",") if part.strip()]
    return [SigningKey.of(_material(reference)) for reference in references]


def _material(reference: str) -> bytes:
    # Never the value itself in a message: it may be the key.
    if not reference.startswith(("env:", "file:")):
        raise Misconfigured(
            "signing_key", "PARLEY_SIGNING_KEY must name where the key is, env:NAME or file:/path, not the key itself."
        )
    material = resolve(reference).encode()
    if len(material) < _SHORTEST:
        raise Misconfigured(
            "signing_key", f"The key at {reference} is too short; `openssl rand -hex 32` prints one that is not."
        )
    return material


async def renew(connection: Connection) -> None:
    """Have the replicas sign with a new key. The one before stays good, the one before that does not."""
    await connection.execute(_RENEW, secrets.token_bytes(_BYTES))


class Signing:
    """The keys as this replica knows them: two of the table, or those that are given."""

    def __init__(self, pool: Pool, *, given: Sequence[SigningKey] = (), look_s: float = _LOOK_S) -> None:
        self._pool = pool
        self._given = bool(given)
        self._keys = list(given)
        self._look_s = look_s
        self._looked = -look_s
        self._turn = asyncio.Lock()

    @property
    def first(self) -> SigningKey | None:
        """The one that signs; None before the table was read."""
        return self._keys[0] if self._keys else None

    async def run_once(self) -> None:
        """Read the table; make the key where there is none."""
        if self._given:
            return
        async with prompt_connection(self._pool) as connection:
            if not await connection.fetchval(_ANY):
                await connection.execute(_MAKE, secrets.token_bytes(_BYTES))
            self._keys = [SigningKey.of(row["material"]) for row in await connection.fetch(_ALL)]
        self._looked = monotonic()

    async def find(self, key_id: bytes) -> SigningKey | None:
        """One that another replica made a moment ago, too."""
        if (key := self._known(key_id)) is None and not self._given:
            async with self._turn:
                if monotonic() - self._looked >= self._look_s:
                    await self.run_once()
            key = self._known(key_id)
        return key

    def _known(self, key_id: bytes) -> SigningKey | None:
        return next((key for key in self._keys if key.id == key_id), None)
