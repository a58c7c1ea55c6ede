"""What users do to their chats without a device of their own: the gateway says it, and all devices hear of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID, uuid5

from app.errors import Conflict, Invalid, NotFound
from app.postgres import Connection
from app.sync import chats
from app.sync.changes import Changes
from app.sync.merge import LEAST, AddMessage, Chat, DeleteChat, Message, Op, PutChat, behind, stamp_at
from app.sync.rows import CHAT, MESSAGE, message_of

# Of a branch: messages in all, messages and bytes in a transaction, where there may be one message more.
MOST_COPIED = 10_000
_PIECE, _BYTES = 500, 4 << 20
_COPIES = UUID("0e2b6d0c-3c0c-5a0e-8f0a-5d5c7f5b9a31")

_POINT = "select position from messages where user_id = $1 and chat_id = $2 and id = $3 and not is_deleted"
_COUNT = """
select count(*) from (
    select from messages where user_id = $1 and chat_id = $2 and position <= $3 and not is_deleted limit $4) counted
"""
_TAKEN = f"select {CHAT} from chats where user_id = $1 and id = $2"
_PAST = f"""
select {MESSAGE}, position from (
    select *, coalesce(sum(octet_length(content) + octet_length(attachments)) over (
        order by position rows between unbounded preceding and 1 preceding), 0) as before
    from (select {MESSAGE}, position from messages
        where user_id = $1 and chat_id = $2 and position > $3 and position <= $4
            and not is_deleted and status <> 'failed'
        order by position limit {_PIECE}) next) sized
where before < {_BYTES} order by position
"""


def later(chat: Chat, now_ms: int) -> str:
    """A stamp that is greater than the chat's."""
    return max(stamp_at(now_ms), behind(chat.stamp))


async def rename(changes: Changes, user_id: str, chat_id: str, title: str) -> None:
    """Raises NotFound."""

    async def ops(connection: Connection, now_ms: int) -> Sequence[Op]:
        chat = await chats.require(connection, user_id, chat_id)
        put = PutChat(chat.id, title, later(chat, now_ms), chat.parent_chat_id, chat.branch_from_message_id)
        return [put] if title != chat.title else []

    await changes.write(user_id, ops)


async def delete(changes: Changes, user_id: str, chat_id: str) -> None:
    """Raises NotFound."""

    async def ops(connection: Connection, now_ms: int) -> Sequence[Op]:
        chat = await chats.require(connection, user_id, chat_id)
        return [DeleteChat(chat.id, later(chat, now_ms))]

    await changes.write(user_id, ops)


@dataclass(slots=True)
class Branch:
    """A copy of a chat up to one of its messages, which goes its own way from there.

    It is made in pieces, each of them a transaction. With an `id` that somebody gave, doing it again goes on with it.
    """

    changes: Changes
    user_id: str
    chat_id: str
    message_id: str
    id: str
    title: str | None = None
    # Up to which position it was copied, and the stamp of the last copy; then the same of the piece under way, None
    # at the end.
    _at: tuple[int, str] = (0, LEAST)
    _reached: tuple[int, str] | None = None

    async def make(self) -> None:
        """Raises NotFound for an unknown chat or message, Conflict for an id that another chat has, and Invalid."""
        while True:
            await self.changes.write(self.user_id, self._piece)
            if self._reached is None:
                return
            self._at = self._reached

    async def _piece(self, connection: Connection, now_ms: int) -> Sequence[Op]:
        chat = await chats.require(connection, self.user_id, self.chat_id)
        until = await connection.fetchval(_POINT, self.user_id, self.chat_id, self.message_id)
        if until is None:
            raise NotFound("message_unknown", "The chat has no such message; GET /api/chats/ID/messages lists them.")
        made = await self._made(connection, chat, until, now_ms)
        rows = await connection.fetch(_PAST, self.user_id, self.chat_id, self._at[0], until)
        copies = self._copies([message_of(row) for row in rows])
        ended = not rows or rows[-1]["position"] >= until
        self._reached = None if ended else (rows[-1]["position"], copies[-1].stamp)
        return [*made, *copies]

    async def _made(self, connection: Connection, chat: Chat, until: int, now_ms: int) -> Sequence[Op]:
        row = await connection.fetchrow(_TAKEN, self.user_id, self.id)
        if row is None:
            if await connection.fetchval(_COUNT, self.user_id, chat.id, until, MOST_COPIED + 1) > MOST_COPIED:
                raise Invalid("branch_too_long", f"More than {MOST_COPIED} messages stand before this one.")
            title = chat.title if self.title is None else self.title
            return [PutChat(self.id, title, stamp_at(now_ms), chat.id, self.message_id)]
        there = Chat(*row)
        if there.is_deleted or (there.parent_chat_id, there.branch_from_message_id) != (chat.id, self.message_id):
            raise Conflict("chat_exists", "Another chat has this id, or had it; choose a new one.")
        return []

    def _copies(self, messages: Sequence[Message]) -> list[AddMessage]:
        """In the order in which they stand here: devices go by stamps alone."""
        copies, stamp = [], self._at[1]
        for one in messages:
            stamp = max(one.stamp, behind(stamp))
            given = (one.role, one.content, stamp, one.parent_id and self._copy_id(one.parent_id))
            copies.append(AddMessage(self._copy_id(one.id), self.id, *given, one.attachments, one.status))
        return copies

    def _copy_id(self, message_id: str) -> str:
        return str(uuid5(_COPIES, f"{self.id}\n{message_id}"))
