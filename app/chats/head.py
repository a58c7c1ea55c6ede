"""sync_head: one row per user, the counter of changes to its chats and the lock of all who write them.

Whoever has it writes rows with the number it got and holds it to the commit, so commits come in the order of numbers
(docs/decisions/0014-sync.md).
"""

from app.postgres import Connection

_ADVANCE = """
insert into sync_head as h (user_id, seq) values ($1, 1)
on conflict (user_id) do update set seq = h.seq + 1 returning seq
"""


async def advance(connection: Connection, user_id: str) -> int:
    """Lock the user's chats until the transaction ends; the number of the change that it makes.

    Nobody in particular (no user) has no devices and no lock: 0.
    """
    if not user_id:
        return 0
    seq: int = await connection.fetchval(_ADVANCE, user_id)
    return seq
