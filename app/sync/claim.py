"""Taking over the chats of another user, who proves to be one and the same person: once, and in bounded pieces."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from asyncpg import UniqueViolationError

from app.access.audit import Actor, fingerprint, note
from app.errors import Conflict, Unavailable
from app.postgres import Connection, Pool
from app.sync import arrivals
from app.sync.changes import Changes
from app.sync.edits import later
from app.sync.merge import LEAST, AddMessage, Chat, DeleteChat, Message, Op, PutChat, behind, stamp_at
from app.sync.rows import CHAT, MESSAGE, message_of
from app.wall import Reach, Wall, within

# How often a chat is copied whose user goes on writing in it; what is left is for another claim.
_TRIES = 5
# Of a transaction: messages, and bytes of text, of which there may be one message more; and pictures.
_PIECE, _BYTES, _PICTURES = 500, 2 << 20, 100

_BEGIN = "insert into chat_claims (from_user_id, user_id) values ($1, $2) on conflict do nothing returning 1"
_BY = "select user_id from chat_claims where from_user_id = $1"
_BUSY = """
select exists (select from conversation_sessions where user_id = $1 and status = 'active')
    or exists (select from queued_messages where user_id = $1)
"""
# The same picture of both is one then.
_TWICE = "select f.id, t.id from images f join images t on t.user_id = $2 and t.sha256 = f.sha256 where f.user_id = $1"
_PICTURES_MOVED = f"""
with piece as (
    select f.ctid from images f where f.user_id = $1
        and not exists (select from images t where t.user_id = $2 and t.sha256 = f.sha256) limit {_PICTURES}),
moved as (
    update images set user_id = $2 where user_id = $1 and ctid = any(array(select ctid from piece)) returning 1)
select count(*) from moved
"""
_NEXT = f"select {CHAT} from chats where user_id = $1 and id > $2 and not is_deleted order by id limit 1"
# Another one than before where anything in the chat has changed.
_STATE = """
select c.seq, c.is_deleted, count(m.id) as messages, coalesce(max(m.seq), 0) as last from chats c
left join messages m on m.user_id = c.user_id and m.chat_id = c.id
where c.user_id = $1 and c.id = $2 group by 1, 2
"""
# What was there before stamps were has one of when it came.
_MESSAGES = f"""
select {MESSAGE.replace("stamp", "told as stamp")}, position from (
    select *, case when stamp > '{LEAST}' then stamp
            else lpad(to_hex((extract(epoch from created_at) * 1000)::bigint), 12, '0') || '-0000' end as told,
        coalesce(sum(octet_length(content) + octet_length(attachments)) over (
            order by position rows between unbounded preceding and 1 preceding), 0) as before
    from (select * from messages
        where user_id = $1 and chat_id = $2 and position > $3 and not is_deleted and status <> 'failed'
        order by position limit {_PIECE}) next) sized
where before < {_BYTES} order by position
"""


@dataclass(slots=True)
class Claim:
    """What `from_user` has becomes `user_id`'s. Any number of times with the same effect: what is there is not copied
    again, and what came meanwhile follows. Usage stays whose it was.
    """

    pool: Pool
    wall: Wall
    changes: Changes
    user_id: str
    from_user: str
    chats: int = 0
    messages: int = 0
    _twins: Mapping[str, str] = field(default_factory=dict)

    async def take(self, actor: Actor) -> None:
        """Raises Conflict where somebody else has taken them, or while an answer is under way."""
        async with self.pool.acquire() as connection, connection.transaction():
            if await connection.fetchval(_BEGIN, self.from_user, self.user_id):
                await note(connection, actor, "chats.claim", target=self.user_id, detail=fingerprint(self.from_user))
            elif await connection.fetchval(_BY, self.from_user) != self.user_id:
                raise Conflict("already_claimed", "Somebody else has taken over these chats.")
            if await connection.fetchval(_BUSY, self.from_user):
                raise Conflict("session_busy", "An answer is under way there; try again when it has ended.")
        await self._pictures()
        after = ""
        while (chat := await self._next(after)) is not None:
            await self._move(chat)
            after = chat.id

    async def _pictures(self) -> None:
        for _ in range(_TRIES):
            # The same picture may come from elsewhere meanwhile: then it is one of both, and stays.
            with suppress(UniqueViolationError):
                while await self.pool.fetchval(_PICTURES_MOVED, self.from_user, self.user_id):
                    pass
                break
        else:
            raise Unavailable("database_busy", "The same pictures keep coming from elsewhere.", retry_after=1)
        # Those that stayed.
        rows = await self.pool.fetch(_TWICE, self.from_user, self.user_id)
        self._twins = {str(theirs): str(ours) for theirs, ours in rows}

    async def _next(self, after: str) -> Chat | None:
        with within(Reach(self.from_user)):
            async with self.wall.connection() as connection:
                row = await connection.fetchrow(_NEXT, self.from_user, after)
        return None if row is None else Chat(*row)

    async def _move(self, chat: Chat) -> None:
        """Copy it, then delete it, unless something has come meanwhile: then once more, but not for ever."""
        for _ in range(_TRIES):
            if (state := await self._copy(chat)) is None:
                return
            with within(Reach(self.from_user)):
                # That all of them were taken is on record.
                done = await self.changes.write(self.from_user, partial(self._gone, chat, state), noted=False)
            if done.chats:
                return

    async def _gone(self, chat: Chat, state: tuple[object, ...], connection: Connection, now_ms: int) -> Sequence[Op]:
        now = await connection.fetchrow(_STATE, self.from_user, chat.id)
        if now is None or tuple(now) != state:
            return []
        _, have = (await arrivals.targets(connection, self.from_user, [chat.id]))[chat.id]
        return [DeleteChat(chat.id, later(have or chat, now_ms))]

    async def _copy(self, chat: Chat) -> tuple[object, ...] | None:
        """Copy all of it; what it was when that began. None where somebody has deleted it."""
        position, stamp, state = 0, LEAST, None
        while True:
            with within(Reach(self.from_user)):
                async with self.wall.connection() as connection:
                    if state is None:
                        row = await connection.fetchrow(_STATE, self.from_user, chat.id)
                        if row is None or row["is_deleted"]:
                            return None
                        state = tuple(row)
                    rows = await connection.fetch(_MESSAGES, self.from_user, chat.id, position)
            messages = []
            for row in rows:
                message = message_of(row)
                stamp = max(message.stamp, behind(stamp))
                messages.append((message, stamp))
            await self._give(chat, messages)
            if not rows:
                return state
            position = rows[-1]["position"]

    async def _give(self, chat: Chat, messages: Sequence[tuple[Message, str]]) -> None:
        async def ops(connection: Connection, now_ms: int) -> Sequence[Op]:
            parent = chat.parent_chat_id
            there = await arrivals.targets(connection, self.user_id, {chat.id, parent or chat.id})
            target, have = there[chat.id]
            made: list[Op] = []
            if have is None or have.is_deleted:
                stamp = stamp_at(now_ms) if have is None else later(have, now_ms)
                parent = there[parent][0] if parent else parent
                made = [PutChat(target, chat.title, stamp, parent, chat.branch_from_message_id)]
            made += [self._added(one, stamp, target) for one, stamp in messages]
            return await arrivals.apart(connection, self.user_id, made)

        with within(Reach(self.user_id)):
            written = await self.changes.write(self.user_id, ops, dated=True)
        self.chats += len(written.chats)
        self.messages += len(written.messages)

    def _added(self, one: Message, stamp: str, chat_id: str) -> AddMessage:
        attachments = one.attachments
        for theirs, ours in self._twins.items() if attachments != "[]" else ():
            attachments = attachments.replace(theirs, ours)
        return AddMessage(one.id, chat_id, one.role, one.content, stamp, one.parent_id, attachments, one.status)
