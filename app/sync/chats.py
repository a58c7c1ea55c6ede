"""A user's chats for front ends that do not synchronise: lists, one chat, its messages.

The index of conversations knows which chats something was said in last; those it does not know come behind, by id.
"""

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import asyncpg

from app.conversations.index import OWN
from app.errors import BadRequest, NotFound
from app.postgres import Connection
from app.sync.merge import Chat
from app.sync.rows import CHAT

# Of the last message, in characters; branches that an entry names.
_PREVIEW, _BRANCHES = 200, 100
# Rows that a page looks at, where most are none of its own: other programs' conversations, deleted chats.
_FAR = 1_000
# Of a page of messages, texts and attachments in bytes; one message more than that, so that there is always one.
_BYTES = 4 << 20

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

# For rows of `page` (id, and where the index knows the chat: messages and tokens), also where there is no such chat.
_ENTRIES = f"""
select page.*, c.id is not null as is_there, c.title, c.parent_chat_id, c.branch_from_message_id,
    coalesce(page.messages, counted.messages) as message_count, coalesce(page.tokens, 0) as total_tokens,
    coalesce(first.at, c.created_at) as created_at, coalesce(last.at, c.updated_at) as updated_at,
    coalesce(last.preview, '') as preview,
    array(select b.id from chats b where b.user_id = $1 and b.parent_chat_id = page.chat_id and not b.is_deleted
        order by b.id limit {_BRANCHES}) as branches
from page left join chats c on c.user_id = $1 and c.id = page.chat_id and not c.is_deleted
left join lateral (
    select "timestamp" as at from messages
    where user_id = $1 and chat_id = page.chat_id and not is_deleted and status <> 'failed'
    order by position limit 1) first on true
left join lateral (
    select "timestamp" as at, left(content, {_PREVIEW}) as preview from messages
    where user_id = $1 and chat_id = page.chat_id and not is_deleted and status <> 'failed'
    order by position desc limit 1) last on true
left join lateral (
    select count(*)::int as messages from messages where page.messages is null
        and user_id = $1 and chat_id = page.chat_id and not is_deleted and status <> 'failed') counted on true
"""
_WALK = """
select id, source, conversation_id, message_count, total_tokens, last_message_at from conversations
where username = $1 and (last_message_at, id) < ($2, $3) order by last_message_at desc, id desc
"""
_SPOKEN = f"""
with walked as ({_WALK} limit {_FAR}),
page as materialized (
    select id as place, conversation_id as chat_id, message_count as messages, total_tokens as tokens,
        last_message_at as at
    from walked where source = '{OWN}' order by last_message_at desc, id desc limit $4)
{_ENTRIES} order by page.at desc, page.place desc
"""
_SPOKEN_FAR = f"select last_message_at as at, id as place from ({_WALK} limit 1 offset {_FAR - 1}) far"
_SILENT = f"""
with walked as (
    select id, is_deleted from chats where user_id = $1 and id > $2 order by id limit {_FAR}),
page as materialized (
    select w.id as chat_id, null::int as messages, null::bigint as tokens from walked w
    where not w.is_deleted and not exists (select from conversations v
        where v.source = '{OWN}' and v.username = $1 and v.conversation_id = w.id)
    order by w.id limit $3)
{_ENTRIES} order by page.chat_id
"""
_SILENT_FAR = f"select id from chats where user_id = $1 and id > $2 order by id limit 1 offset {_FAR - 1}"
_ONE = f"""
with page as materialized (
    select $2::text as chat_id, v.message_count as messages, v.total_tokens as tokens from (select) nothing
    left join conversations v on (v.source, v.username, v.conversation_id) = ('{OWN}', $1, $2))
{_ENTRIES}
"""
_CHAT = f"select {CHAT} from chats where user_id = $1 and id = $2 and not is_deleted"
_MESSAGES = """
select id, role, case when before < {bytes} then content end as content, status,
    case when before < {bytes} then attachments end as attachments, parent_id, position, "timestamp",
    before < {bytes} as fits
from (
    select *, coalesce(sum(octet_length(content) + octet_length(attachments)) over (
        order by position {way} rows between unbounded preceding and 1 preceding), 0) as before
    from (
        select id, role, content, status, attachments, parent_id, position, "timestamp" from messages
        where user_id = $1 and chat_id = $2 and not is_deleted and (status <> 'failed' or $5) and position {than} $3
        order by position {way} limit $4) next) sized
order by position {way}
"""
_FORWARD = _MESSAGES.format(bytes=_BYTES, way="asc", than=">")
_BACKWARD = _MESSAGES.format(bytes=_BYTES, way="desc", than="<")
_LAST_POSITION = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class Place:
    """Behind a conversation of the index, or where `chat` is given, behind that one of those it does not know."""

    at: datetime = datetime(9999, 1, 1, tzinfo=UTC)
    id: int = 0
    chat: str | None = None

    def __str__(self) -> str:
        told = f"s.{(self.at - _EPOCH) // timedelta(microseconds=1)}.{self.id}"
        told = told if self.chat is None else f"e.{self.chat}"
        return base64.urlsafe_b64encode(told.encode()).decode().rstrip("=")


def place(cursor: str) -> Place:
    """What a list has told. Raises BadRequest for anything else."""
    try:
        told = base64.b64decode(cursor + "=" * (-len(cursor) % 4), b"-_", validate=True).decode()
        kind, _, rest = told.partition(".")
        if kind == "e" and "\0" not in rest:
            return Place(chat=rest)
        micros, number = map(int, rest.split("."))
        if kind == "s" and 0 <= number < 1 << 63:
            return Place(_EPOCH + timedelta(microseconds=micros), number)
    except (binascii.Error, ValueError, OverflowError):
        pass
    raise BadRequest("bad_cursor", "cursor is none of this list; begin without one.")


@dataclass(frozen=True, slots=True)
class Page:
    """`behind` is where the next page begins; None at the end."""

    rows: Sequence[asyncpg.Record]
    behind: Place | None


async def page(connection: Connection, user_id: str, *, after: Place, size: int) -> Page:
    """A user's chats behind a place; the ones that something was said in last come first."""
    spoken = Page((), after) if after.chat is not None else await _spoken(connection, user_id, after, size)
    if spoken.behind is None or spoken.behind.chat is None:
        return spoken
    silent = await _silent(connection, user_id, spoken.behind.chat, size - len(spoken.rows))
    return Page([*spoken.rows, *silent.rows], silent.behind)


async def _spoken(connection: Connection, user_id: str, after: Place, size: int) -> Page:
    rows = await connection.fetch(_SPOKEN, user_id, after.at, after.id, size + 1)
    if len(rows) > size:
        return Page(_there(rows[:size]), Place(rows[size - 1]["at"], rows[size - 1]["place"]))
    far = await connection.fetchrow(_SPOKEN_FAR, user_id, after.at, after.id)
    return Page(_there(rows), Place(chat="") if far is None else Place(far["at"], far["place"]))


def _there(rows: Sequence[asyncpg.Record]) -> Sequence[asyncpg.Record]:
    """Without those that the index still knows, and that are gone."""
    return [row for row in rows if row["is_there"]]


async def _silent(connection: Connection, user_id: str, after: str, size: int) -> Page:
    rows = await connection.fetch(_SILENT, user_id, after, size + 1)
    if len(rows) > size:
        return Page(rows[:size], Place(chat=rows[size - 1]["chat_id"] if size else after))
    far = await connection.fetchval(_SILENT_FAR, user_id, after)
    return Page(rows, None if far is None else Place(chat=far))


async def entry(connection: Connection, user_id: str, chat_id: str) -> asyncpg.Record:
    """A chat as a list shows it. Raises NotFound."""
    row = await connection.fetchrow(_ONE, user_id, chat_id)
    if row is None or not row["is_there"]:
        raise unknown()
    return row


async def require(connection: Connection, user_id: str, chat_id: str) -> Chat:
    """A chat as it is merged. Raises NotFound."""
    row = await connection.fetchrow(_CHAT, user_id, chat_id)
    if row is None:
        raise unknown()
    return Chat(*row)


def unknown() -> NotFound:
    return NotFound("chat_unknown", "There is no such chat, or it was deleted; GET /api/chats lists them.")


@dataclass(frozen=True, slots=True)
class Messages:
    """A page in its order; `behind` is the position of the last of them where more follow."""

    rows: Sequence[asyncpg.Record]
    behind: int | None


async def messages(
    connection: Connection,
    user_id: str,
    chat_id: str,
    *,
    size: int,
    after: int | None = None,
    backward: bool = False,
    failed: bool = False,
) -> Messages:
    """Messages of a chat behind a position, or, `backward`, before it; failed ones only where asked for."""
    start = (_LAST_POSITION if backward else 0) if after is None else after
    query = _BACKWARD if backward else _FORWARD
    found = await connection.fetch(query, user_id, chat_id, start, size + 1, failed)
    rows = [row for row in found[:size] if row["fits"]]
    return Messages(rows, rows[-1]["position"] if len(rows) < len(found) else None)
