"""One conversation of ours with its messages, a page at a time."""

from collections.abc import Sequence
from dataclasses import dataclass

import asyncpg

from app.conversations.index import OWN
from app.errors import Conflict, NotFound
from app.postgres import Connection

# Conversations of one name that a refusal lists.
_NAMESAKES = 20

_NAMED = """
select source, username, message_count, message_ids from conversations
where conversation_id = $1 and ($2::text is null or username = $2) and ($3::text is null or source = $3)
order by source, username limit $4
"""
# Texts and attachments of a page, in bytes; one message more than that, so that there is always one.
_BYTES = 4 << 20
_MESSAGES = f"""
select id, role, case when before < {_BYTES} then content end as content, status,
    case when before < {_BYTES} then attachments end as attachments, position, created_at, before < {_BYTES} as fits
from (
    select *, coalesce(sum(octet_length(content) + octet_length(attachments)) over (
        order by position rows between unbounded preceding and 1 preceding), 0) as before
    from (
        select id, role, content, status, attachments, position, created_at from messages
        where user_id = $1 and chat_id = $2 and not is_deleted and position > $3 order by position limit $4) next) sized
order by position
"""


@dataclass(frozen=True, slots=True)
class Named:
    """Which conversation, and how many messages it has; `keys` are those of its rows that the index holds."""

    source: str
    username: str
    id: str
    messages: int
    keys: Sequence[str] = ()

    @property
    def is_own(self) -> bool:
        return self.source == OWN


@dataclass(frozen=True, slots=True)
class Messages:
    """A page of messages in their order; `behind` is the position of the last of them where more follow."""

    rows: Sequence[asyncpg.Record]
    behind: int | None


async def find(
    connection: Connection, conversation_id: str, *, username: str | None = None, source: str | None = None
) -> Named:
    """The one conversation of this id. Raises NotFound for none, Conflict where there are several."""
    rows = await connection.fetch(_NAMED, conversation_id, username, source, _NAMESAKES)
    if not rows:
        raise NotFound("conversation_unknown", "There is no such conversation; GET /api/messages/conversations lists.")
    if len(rows) > 1:
        those = [{"source": row["source"], "username": row["username"]} for row in rows]
        detail = "Several conversations have this id; say which by source and username."
        raise Conflict("ambiguous", detail, conversations=those)
    row = rows[0]
    return Named(row["source"], row["username"], conversation_id, row["message_count"], row["message_ids"])


async def own_messages(connection: Connection, named: Named, *, after: int, size: int) -> Messages:
    """Messages of a conversation of ours behind a position."""
    assert named.is_own
    found = await connection.fetch(_MESSAGES, named.username, named.id, after, size + 1)
    rows = [row for row in found[:size] if row["fits"]]
    return Messages(rows, rows[-1]["position"] if len(rows) < len(found) else None)
