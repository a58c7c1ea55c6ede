"""The keys that sign stream tokens: those that a setting names, or else those of the table `signing_keys`.

The first signs, all of them are believed: a key can be replaced while tokens of the one before are still in use.
"""

import asyncio
import secrets
from collections.abc import Sequence
from time import monotonic

from app.access.stream_token import SigningKey
from app.postgres import Connection, Pool, prompt_connection
from app.references import materials
from app.safe import NO_SAFE, Safe
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
_STORED = "select number, material from signing_keys order by number for update"
_REPLACE = "update signing_keys set material = $2 where number = $1"
# In the table as they are, or encrypted, which is longer.
_BYTES = 32
# Strangers with ids of keys that do not exist cause a look into the table this often at most, in seconds.
_LOOK_S = 5.0


def given_keys(settings: Settings) -> list[SigningKey]:
    """Those that PARLEY_SIGNING_KEY names. Raises Misconfigured for what is no reference, or too short a key."""
    given = materials("PARLEY_SIGNING_KEY", settings.signing_key, code="signing_key")
    return [SigningKey.of(material) for material in given]


async def renew(connection: Connection, safe: Safe) -> None:
    """Have the replicas sign with a new key. The one before stays good, the one before that does not."""
    await connection.execute(_RENEW, _kept(secrets.token_bytes(_BYTES), safe))


async def stored(connection: Connection) -> list[str | None]:
    """The keys of the table as they are encrypted; None for one that is not."""
    return [_sealed(row["material"]) for row in await connection.fetch(_ALL)]


async def rotate(connection: Connection, safe: Safe) -> int:
    """Encrypt the keys with the newest master key; returns how many that changed. Raises Misconfigured."""
    async with connection.transaction():
        rows = [(row["number"], row["material"]) for row in await connection.fetch(_STORED)]
        kept = [(number, _kept(_material(old, safe), safe), old) for number, old in rows]
        changed = [(number, new) for number, new, old in kept if new != old]
        await connection.executemany(_REPLACE, changed)
    return len(changed)


def _kept(material: bytes, safe: Safe) -> bytes:
    """As the table has it: encrypted where there is a master key."""
    return safe.seal(material.hex(), "signing").encode() if safe.newest else material


def _sealed(kept: bytes) -> str | None:
    return None if len(kept) == _BYTES else kept.decode("ascii", "replace")


def _material(kept: bytes, safe: Safe) -> bytes:
    sealed = _sealed(kept)
    return kept if sealed is None else bytes.fromhex(safe.open(sealed, "signing"))


class Signing:
    """The keys as this replica knows them: two of the table, or those that are given."""

    def __init__(
        self, pool: Pool, *, given: Sequence[SigningKey] = (), safe: Safe = NO_SAFE, look_s: float = _LOOK_S
    ) -> None:
        self._pool = pool
        self._safe = safe
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
        """Read the table; make the key where there is none. Raises Misconfigured for one that cannot be decrypted."""
        if self._given:
            return
        async with prompt_connection(self._pool) as connection:
            if not await connection.fetchval(_ANY):
                await connection.execute(_MAKE, _kept(secrets.token_bytes(_BYTES), self._safe))
            kept = [row["material"] for row in await connection.fetch(_ALL)]
        self._keys = [SigningKey.of(_material(one, self._safe)) for one in kept]
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
