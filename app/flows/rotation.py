"""The secrets that the database holds: which master keys they are encrypted with, and all of them under the newest."""

from collections import Counter
from dataclasses import dataclass

from app.access import signing
from app.flows import chatbots
from app.postgres import Connection
from app.safe import Safe, sealed_with


@dataclass(frozen=True, slots=True)
class Holdings:
    """Encrypted values by the id of their master key, and signing keys that are not encrypted."""

    sealed: Counter[str]
    plain: int

    def others(self, safe: Safe) -> int:
        """How many are not encrypted with the newest key."""
        return self.plain + self.sealed.total() - self.sealed[safe.newest or ""]


async def holdings(connection: Connection) -> Holdings:
    """Counted, not decrypted."""
    material = await signing.stored(connection)
    sealed = [*(await chatbots.sealed_keys(connection)), *(one for one in material if one is not None)]
    return Holdings(Counter(map(sealed_with, sealed)), material.count(None))


async def rotate(connection: Connection, safe: Safe) -> int:
    """Encrypt every secret with the newest master key; returns how many rows that changed.

    It may be cut anywhere and done again: each row is right before and after. Chatbots that are applied meanwhile are
    new rows, so neither undoes the other. Raises Misconfigured for a value that no key reads; the others are done.
    """
    safe.require()
    return await signing.rotate(connection, safe) + await chatbots.rotate(connection, safe)
