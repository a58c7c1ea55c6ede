"""sync_head: one row per user, the counter of changes to its chats and the lock of all who write them.

Whoever has it writes rows with the number it got and holds it to the commit, so commits come in the order of numbers
(docs/decisions/0014-sync.md).
"""

from functools import lru_cache
from uuid import UUID, uuid5

from app.commits import note
from app.postgres import Connection

_ADVANCED = """
insert into sync_head as h (user_id, seq) {row}
on conflict (user_id) do update set seq = h.seq + 1 returning seq
"""
_ADVANCE = _ADVANCED.format(row="values ($1, 1)")
_CHATS = UUID("6c1f5bb1-5d36-4b0e-9a3c-0d6a6f0f5f14")


def advanced(row: str) -> str:
    """SQL: `advance` as a query of a greater statement, for the user and the 1 that `row` selects."""
    return _ADVANCED.format(row=row)


async def advance(connection: Connection, user_id: str) -> int:
    """Lock the user's chats until the transaction ends; the number of the change that it makes.

    Nobody in particular (no user) has no devices and no lock: 0.
    """
    if not user_id:
        return 0
    seq: int = await connection.fetchval(_ADVANCE, user_id)
    moved(user_id, seq)
    return seq


def moved(user_id: str, seq: int) -> None:
    """Note that this transaction has changed the user's chats: the user's devices are told once it is committed."""
    note(chats_of(user_id), seq)


@lru_cache(maxsize=10_000)
def chats_of(user_id: str) -> UUID:
    """The topic that the chats of a user are. Names no user: any role of the database hears what replicas say."""
    return uuid5(_CHATS, user_id)
