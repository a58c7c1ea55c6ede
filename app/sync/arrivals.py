"""Where chats go that come to a user from elsewhere: from a file, or from another user."""

from collections.abc import Collection, Sequence

from app.postgres import Connection
from app.sync.merge import Chat, successor
from app.sync.rows import CHAT

# How often a chat may have been purged and come again.
_LIVES = 8

_KNOWN = f"select {CHAT} from chats where user_id = $1 and id = any($2::text[])"


async def targets(connection: Connection, user_id: str, names: Collection[str]) -> dict[str, tuple[str, Chat | None]]:
    """By each chat's id the one that takes its messages, which is another where it was purged, and what is there."""
    lines = {name: _line(name) for name in names}
    rows = await connection.fetch(_KNOWN, user_id, sorted({one for line in lines.values() for one in line}))
    known = {row["id"]: Chat(*row) for row in rows}
    found = {}
    for name, line in lines.items():
        target = next((one for one in line if one not in known or not known[one].is_purged), name)
        found[name] = (target, known.get(target))
    return found


def _line(name: str) -> Sequence[str]:
    """The chat, and those that come after it where it was purged."""
    names = [name]
    while len(names) < _LIVES:
        names.append(successor(names[-1]))
    return names
