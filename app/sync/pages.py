"""What a device has not seen, a page at a time: cut between two changes, bounded in rows and in bytes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import asyncpg

from app.postgres import Connection
from app.sync.cursor import Cursor
from app.sync.merge import Chat, Message, State
from app.sync.rows import CHAT, MESSAGE, Marks, message_of

Row = TypeVar("Row", Chat, Message)
ROWS = 500
# Texts and attachments of messages; one more change than that, so that there is always one.
BYTES = 4 << 20
# No device is called so.
NO_CLIENT = " "

# Own rows are known, but for those from before a bootstrap.
_UNSEEN = "user_id = $1 and seq > 0 and seq > $2 and seq <= $3 and (origin <> $4 or seq <= $5)"
_CHATS = f"select seq, origin, {CHAT} from chats where {_UNSEEN} order by seq limit {ROWS + 1}"
# Text beyond the bound is not read; a row without it ends the page.
_FIT = MESSAGE
for _name in ("content", "attachments"):
    _FIT = _FIT.replace(_name, f"case when before < {BYTES} then {_name} end as {_name}")
_MESSAGES = f"""
select seq, origin, before < {BYTES} as fits, {_FIT}
from (
    select *, coalesce(sum(octet_length(content) + octet_length(attachments)) over (
        order by seq groups between unbounded preceding and 1 preceding), 0) as before
    from (select seq, origin, {MESSAGE} from messages where {_UNSEEN} and ($6 or status <> 'failed' or is_deleted)
        order by seq limit {ROWS + 1}) unseen) sized
order by seq
"""
# Whether there is anything of others for a device that is in no bootstrap.
UNSEEN = """
    exists (select from chats where user_id = $1 and seq > 0 and seq > $4 and origin <> $5) as unseen_chats,
    exists (select from messages where user_id = $1 and seq > 0 and seq > $4 and origin <> $5) as unseen_messages
"""


@dataclass(frozen=True, slots=True)
class Page:
    """`cursor` is where the next one begins."""

    chats: Sequence[Chat]
    messages: Sequence[Message]
    cursor: Cursor
    more: bool


async def read(
    connection: Connection,
    user_id: str,
    cursor: Cursor,
    *,
    client: str,
    last: int,
    unseen: tuple[bool, bool] = (True, True),
) -> Page:
    """Rows behind the cursor, up to the change `last`. `unseen`: whether to look for chats, and for messages."""
    if cursor.seq >= last:
        return Page((), (), cursor, False)
    if unseen == (False, False):
        return Page((), (), cursor.at(last, failed=cursor.failed), False)
    values = (user_id, cursor.seq, last, client or NO_CLIENT, cursor.until)
    chats = await connection.fetch(_CHATS, *values) if unseen[0] else []
    messages = await connection.fetch(_MESSAGES, *values, cursor.failed) if unseen[1] else []
    end = _end(sorted([*(row["seq"] for row in chats), *(row["seq"] for row in messages)]), last)
    end = min([end, *(row["seq"] - 1 for row in messages if not row["fits"])])
    return Page(
        [_chat(row) for row in chats if row["seq"] <= end],
        [message_of(row) for row in messages if row["seq"] <= end],
        cursor.at(end, failed=cursor.failed),
        end < last,
    )


# A row by its id, with its number and its origin.
Rows = dict[str, tuple[int, str, Row]]


@dataclass(frozen=True, slots=True)
class Shared:
    """Rows that several of a user's devices may not have seen."""

    chats: Rows[Chat]
    messages: Rows[Message]

    def write(self, state: State, marks: Marks) -> None:
        """Add what was written since."""
        self.chats.update({name: (*mark, state.chats[name]) for name, mark in marks.chats.items()})
        self.messages.update({name: (*mark, state.messages[name]) for name, mark in marks.messages.items()})

    def page(self, cursor: Cursor, *, client: str, last: int) -> Page:
        """What one of them has not seen, if nothing behind the change `last` was written yet."""
        chats, messages = _news(self.chats, cursor, client), _news(self.messages, cursor, client)
        return Page(chats, messages, cursor.at(last, failed=cursor.failed), False)


def _news(rows: Rows[Row], cursor: Cursor, client: str) -> list[Row]:
    return [one for seq, origin, one in rows.values() if seq > cursor.seq and origin != client]


async def share(
    connection: Connection, user_id: str, cursors: Sequence[Cursor], *, last: int, unseen: tuple[bool, bool]
) -> Shared | None:
    """What several who are in no bootstrap have not seen, read once; None where that is more than half a page."""
    values = (user_id, min((cursor.seq for cursor in cursors), default=last), last, NO_CLIENT, 0)
    chats = await connection.fetch(_CHATS, *values) if unseen[0] else []
    messages = await connection.fetch(_MESSAGES, *values, True) if unseen[1] else []
    if len(chats) + len(messages) > ROWS // 2 or not all(row["fits"] for row in messages):
        return None
    return Shared(
        {row["id"]: (row["seq"], row["origin"], _chat(row)) for row in chats},
        {row["id"]: (row["seq"], row["origin"], message_of(row)) for row in messages},
    )


def _chat(row: asyncpg.Record) -> Chat:
    return Chat(*list(row)[2:])


def _end(seqs: Sequence[int], last: int) -> int:
    """The last change that is on the page with all of its rows."""
    return seqs[ROWS] - 1 if len(seqs) > ROWS else last
