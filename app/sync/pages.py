"""What a device has not seen, a page at a time: cut between two changes, bounded in rows and in bytes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import asyncpg
import orjson

from app.postgres import Connection
from app.sync.cursor import Cursor
from app.sync.merge import Chat, Message, State
from app.sync.rows import CHAT, MESSAGE, Marks, chat_of, message_of

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
_SIZED = """
select seq, origin, before < {most} as fits, {fit}
from (
    select *, coalesce(sum(octet_length(content) + octet_length(attachments)) over (
        order by seq groups between unbounded preceding and 1 preceding), 0) as before
    from (select seq, origin, {message} from messages where {unseen} order by seq limit {rows}) unseen) sized
order by seq
"""


def _sized(unseen: str, rows: int) -> str:
    return _SIZED.format(most=BYTES, fit=_FIT, message=MESSAGE, unseen=unseen, rows=rows)


_MESSAGES = _sized(f"{_UNSEEN} and ($6 or status <> 'failed' or is_deleted)", ROWS + 1)
# Of what several have not seen: so much, as what they write comes on top.
_HALF = ROWS // 2
_BEHIND = "user_id = $1 and seq > 0 and seq > $4"
SHARED = f"""
    (select json_agg(c) from (
        select seq, origin, {CHAT} from chats where {_BEHIND} order by seq limit {_HALF + 1}) c) as behind_chats,
    (select json_agg(m) from ({_sized(_BEHIND, _HALF + 1)}) m) as behind_messages
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
    values = (user_id, cursor.seq, last, client or NO_CLIENT, cursor.until)
    chats = await connection.fetch(_CHATS, *values) if unseen[0] else []
    messages = await connection.fetch(_MESSAGES, *values, cursor.failed) if unseen[1] else []
    end = _end(sorted([*(row["seq"] for row in chats), *(row["seq"] for row in messages)]), last)
    end = min([end, *(row["seq"] - 1 for row in messages if not row["fits"])])
    return Page(
        [chat_of(row) for row in chats if row["seq"] <= end],
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


def shared(row: asyncpg.Record) -> Shared | None:
    """What `SHARED` has found; None where that is more than half a page."""
    chats, messages = (orjson.loads(row[name] or b"[]") for name in ("behind_chats", "behind_messages"))
    if len(chats) + len(messages) > _HALF or not all(one["fits"] for one in messages):
        return None
    return Shared(
        {one["id"]: (one["seq"], one["origin"], chat_of(one)) for one in chats},
        {one["id"]: (one["seq"], one["origin"], message_of(one)) for one in messages},
    )


def _end(seqs: Sequence[int], last: int) -> int:
    """The last change that is on the page with all of its rows."""
    return seqs[ROWS] - 1 if len(seqs) > ROWS else last
