"""The words of every message of our own chats, where a setting asks for them: a row beside each message.

They follow a user's changes by their numbers, as one more device would (docs/decisions/0014-sync.md), behind those who
save messages and not with them. What was there before is walked through once. Whoever is killed leaves a place to go on
from; each piece is one transaction, which moves that place.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic

import structlog

from app.conversations.index import OWN
from app.conversations.words import tokens
from app.postgres import CONFLICT, Connection, Pool, retry_conflicts

log = structlog.get_logger(__name__)

# How words are made of a text: those of another version are made anew.
VERSION = 1
# As much of a message as is searched, in characters: its words fit a tsvector, and a phrase is found up to the end.
MOST = 32_000
# Messages and chats of one transaction, of which those of one change may be more; seconds of a pass.
_PIECE, _PASS_S = 50, 20.0
# Of a chat that came back so many times more, as those that are there are looked at again for each piece.
_AGAIN = 10
# Users of one look, and those that one pass looks at; all others have their turn in the next ones.
_USERS, _LOOKS = 5_000, 20

# Deleting them keeps everybody who searches waiting.
_LOCK = "set local lock_timeout = '1s'"
_WORDS = tokens("content")
# Of messages m of the user $1: those that a reader of the chat sees. Asked row by row: a user may have many chats.
_SHOWN = """
not m.is_deleted and m.status <> 'failed'
    and (select not c.is_deleted from chats c where c.user_id = $1 and c.id = m.chat_id)
"""
_STATE = """
select is_there, message_words_version as version, message_words_filled_at is not null as is_complete
from conversation_index
"""
_BEGIN = """
update conversation_index set message_words_version = $1, message_words_filled_at = null
where is_there and message_words_version <> $1
"""
_LEFT = """
select message_words_version <> 0 or exists (select from message_word_users) or exists (select from message_words)
from conversation_index
"""
_EMPTY = [
    "update conversation_index set message_words_version = 0, message_words_filled_at = null",
    "truncate message_words, message_word_users",
]
_FILLED = """
update conversation_index set message_words_filled_at = parley_now()
where is_there and message_words_version = $1 and message_words_filled_at is null
"""
# Whoever has just said or deleted something, so that most is done at once however many users there are.
_RECENT = f"""
with recent as (
    (select username from conversations
    where message_count >= 0 and last_message_at >= now() - interval '3 minutes' and source = '{OWN}'
    order by last_message_at desc limit $1)
    union
    (select user_id from chats where is_deleted and not is_emptied and updated_at >= now() - interval '3 minutes'
    order by updated_at desc limit $1))
select array(select h.user_id from recent join sync_head h on h.user_id = recent.username
    left join message_word_users w on w.username = h.user_id where {{only}} order by 1) as behind
"""
# Each by its key, whatever the planner thinks of how many a page has.
_PAGE = """
with page as materialized (select user_id, seq from sync_head where user_id > $1 order by user_id limit $2)
select max(user_id) as last, count(*) as users, array(
    select h.user_id from page h left join lateral (
        select * from message_word_users where username = h.user_id offset 0) w on true
    where {only} order by 1) as behind
from page
"""
_CHANGED = "w.seq <> h.seq"
_BEHIND = f"(w.username is null or w.place is not null or {_CHANGED})"
# Not for whom an erasure has passed: it takes sync_head away before it looks here. Not while the words are dropped.
_KNOW = """
insert into message_word_users (username, seq, place)
select user_id, seq, '' from sync_head
where user_id = $1 and exists (select from conversation_index where is_there and message_words_version = $2)
    and set_config('synchronous_commit', 'off', true) = 'off'
for key share of sync_head on conflict do nothing
"""
# Held to the end of the piece: one at a time, and an erasure waits for what was begun. Nobody waits for the disk: words
# that a crash takes with the last commits come again, as the row that says how far they are has gone with them.
_TAKE = """
select seq, place, set_config('synchronous_commit', 'off', true) from message_word_users
where username = $1 for update skip locked
"""
# One snapshot: whatever has a number up to the head's is committed. `last` is where this piece ends.
_FOLLOW = f"""
with head as (select seq from sync_head where user_id = $1),
page as (
    select count(*) as rows, max(seq) as last from (
        select seq from (
            (select seq from messages where user_id = $1 and seq > $2 and seq > 0 order by seq limit $3)
            union all (select seq from chats where user_id = $1 and seq > $2 and seq > 0 order by seq limit $3)) both_of
        order by seq limit $3) first),
span as (
    select rows < $3 as is_current, case when rows < $3 then head.seq else page.last end as last from head, page
    where head.seq >= $2),
changed as materialized (
    select m.chat_id, m.id, case when {_SHOWN} then left(m.content, {MOST}) end as content from messages m
    where m.user_id = $1 and m.seq > $2 and m.seq > 0 and m.seq <= (select last from span)),
gone as (
    delete from message_words w using changed where changed.content is null
        and (w.username, w.conversation_id, w.message_id) = ($1, changed.chat_id, changed.id)),
written as (
    insert into message_words as w (username, conversation_id, message_id, words)
    select $1, chat_id, id, {_WORDS} from changed where content is not null order by chat_id, id
    on conflict (username, conversation_id, message_id) do update set words = excluded.words
        where w.words <> excluded.words)
select span.last, span.is_current, (select count(*) from changed) as messages,
    array(select id from chats where user_id = $1 and seq > $2 and seq > 0 and seq <= span.last) as chats
from span
"""
# A chat that was deleted, or that came back: its messages have no new numbers. Asked row by row, by their keys:
# PostgreSQL would compare each message of a chat with each.
_UNSHOWN = f"""
delete from message_words w using unnest($2::text[]) as k(id)
where w.username = $1 and w.conversation_id = k.id and (
    select true from messages m where m.user_id = $1 and m.id = w.message_id and {_SHOWN}) is null
"""
_SHOWN_AGAIN = f"""
insert into message_words (username, conversation_id, message_id, words)
select $1, chat_id, id, {_WORDS} from (
    select m.chat_id, m.id, left(m.content, {MOST}) as content from unnest($2::text[]) as k(id)
    cross join lateral (select * from messages where user_id = $1 and chat_id = k.id offset 0) m
    where {_SHOWN} and (select true from message_words w
        where (w.username, w.conversation_id, w.message_id) = ($1, m.chat_id, m.id)) is null limit $3) missing
on conflict do nothing
"""
_FILL = f"""
with page as materialized (
    select m.chat_id, m.id, case when {_SHOWN} then left(m.content, {MOST}) end as content from messages m
    where m.user_id = $1 and m.id > $2 order by m.id limit $3),
written as (
    insert into message_words as w (username, conversation_id, message_id, words)
    select $1, chat_id, id, {_WORDS} from page where content is not null order by chat_id, id
    on conflict (username, conversation_id, message_id) do update set words = excluded.words
        where w.words <> excluded.words)
select count(*) as messages, max(id) as last from page
"""
# Users who were erased by a replica of the version before, which knew nothing of words, and may have begun anew.
_IS_GONE = "not exists (select from sync_head h where h.user_id = w.username and h.seq >= w.seq)"
_GONE = f"select array(select username from message_word_users w where {_IS_GONE} limit 100)"
_FORGET = """
with piece as (select ctid from message_words where username = $1 limit 1000)
delete from message_words where username = $1 and ctid = any(array(select ctid from piece))
"""
_FORGOTTEN = f"delete from message_word_users w where username = $1 and {_IS_GONE}"
_MOVE = "update message_word_users set seq = $2, place = $3 where username = $1"
_IS_COMPLETE = "select message_words_filled_at is not null from conversation_index"
_STATUS = """
select message_words_version > 0 as is_on, message_words_filled_at is not null as is_complete,
    case when message_words_version > 0 then (select count(*) from sync_head) else 0 end as users,
    (select count(*) from message_word_users where place is null) as filled,
    pg_total_relation_size('message_words') as size
from conversation_index
"""


@dataclass(frozen=True, slots=True)
class Status:
    """`filled` of so many users have words of all that was there before; `size` in bytes."""

    is_on: bool
    is_complete: bool
    users: int
    filled: int
    size: int


async def status(connection: Connection | Pool) -> Status:
    """How far the words of messages are. Counts users."""
    row = await connection.fetchrow(_STATUS)
    assert row is not None
    return Status(**row)


async def is_complete(connection: Connection) -> bool:
    """Whether what was there before has its words."""
    complete: bool = await connection.fetchval(_IS_COMPLETE)
    return complete


# Told now and then, with so many messages more.
Tell = Callable[[int], None]


@dataclass(slots=True)
class _Walk:
    """Along all users, as far as `place`; `is_whole`: all of those on the way that are meant are done."""

    only: str
    place: str = ""
    is_whole: bool = True


@dataclass(slots=True)
class MessageWords:
    """Kept or, where it is turned off, dropped. By any number at once: a user's piece is one's at a time."""

    pool: Pool
    is_on: bool
    pass_s: float = _PASS_S
    piece: int = _PIECE
    looks: int = _LOOKS
    _changed: _Walk = field(default_factory=lambda: _Walk(_CHANGED))
    _behind: _Walk = field(default_factory=lambda: _Walk(_BEHIND))

    async def run_once(self) -> int:
        """The job: what has changed, then what was there before; how many messages were looked at."""
        return await self.until(monotonic() + self.pass_s)

    async def until(self, end: float, tell: Tell = lambda _: None) -> int:
        """As `run_once`, until `end` in monotonic time, or until nothing is left."""
        state = await self.pool.fetchrow(_STATE)
        assert state is not None
        if not (self.is_on and state["is_there"]):
            await self._drop()
            return 0
        if state["version"] != VERSION:
            await self._begin()
        recent = await self.pool.fetchval(_RECENT.format(only=_BEHIND), _USERS)
        # However much there is of what was there before, what changes has its share of the time.
        third = (end - monotonic()) / 3
        done, _ = await self._catch_up_all(recent, end - 2 * third, tell)
        if not state["is_complete"]:
            done += await self._go(self._changed, end - third, tell)
        return done + await self._go(self._behind, end, tell)

    async def _begin(self) -> None:
        await self._drop()
        # Those who were done before have nothing any more.
        self._changed, self._behind = _Walk(_CHANGED), _Walk(_BEHIND)
        await self.pool.execute(_BEGIN, VERSION)

    async def _drop(self) -> None:
        if not await self.pool.fetchval(_LEFT):
            return

        async def work() -> None:
            async with self.pool.acquire() as connection, connection.transaction():
                await connection.execute(_LOCK)
                for statement in _EMPTY:
                    await connection.execute(statement)

        await retry_conflicts(work)
        log.info("message_words_dropped")

    async def _go(self, walk: "_Walk", end: float, tell: Tell) -> int:
        """On along the users, to the last of them at the farthest; how many messages that was."""
        done, page = 0, _PAGE.format(only=walk.only)
        for _ in range(self.looks):
            row = await self.pool.fetchrow(page, walk.place, _USERS)
            assert row is not None
            some, is_whole = await self._catch_up_all(row["behind"], end, tell, walk)
            done, walk.is_whole = done + some, walk.is_whole and is_whole
            if monotonic() > end:
                break
            walk.place = row["last"] or ""
            if row["users"] < _USERS:
                if walk is self._behind:
                    await self._come_round(is_whole=walk.is_whole)
                walk.place, walk.is_whole = "", True
                break
        return done

    async def _come_round(self, *, is_whole: bool) -> None:
        if is_whole:
            await self.pool.execute(_FILLED, VERSION)
        for user_id in await self.pool.fetchval(_GONE):
            while await self.pool.execute(_FORGET, user_id) != "DELETE 0":
                pass
            await self.pool.execute(_FORGOTTEN, user_id)

    async def _catch_up_all(
        self, users: Sequence[str], end: float, tell: Tell, walk: "_Walk | None" = None
    ) -> tuple[int, bool]:
        """How many messages, and whether nothing of these is left."""
        done, is_whole = 0, True
        for user_id in users:
            if monotonic() > end:
                return done, is_whole
            if walk is not None:
                # Before it is tried: who cannot be done does not keep the others from it.
                walk.place = user_id
            messages, is_done = await self._catch_up(user_id, end, tell)
            done, is_whole = done + messages, is_whole and is_done
        return done, is_whole

    async def _catch_up(self, user_id: str, end: float, tell: Tell) -> tuple[int, bool]:
        """Everything of a user; whether nothing is left. Somebody else may be at it, or hold the user's chats."""
        done = 0
        try:
            piece = await self._piece(user_id)
            if piece is None:
                await self.pool.execute(_KNOW, user_id, VERSION)
                piece = await self._piece(user_id)
            while piece is not None:
                messages, is_done = piece
                done += messages
                tell(messages)
                if is_done or monotonic() > end:
                    return done, is_done
                piece = await self._piece(user_id)
        except CONFLICT as error:
            log.debug("message_words_waiting", error=type(error).__name__)
        return done, False

    async def _piece(self, user_id: str) -> tuple[int, bool] | None:
        """What has changed, or else what was there before; how many messages, and whether that was the last piece.

        None where the user is not known yet, or somebody else is at it.
        """
        async with self.pool.acquire() as connection, connection.transaction():
            state = await connection.fetchrow(_TAKE, user_id)
            if state is None:
                return None
            place = state["place"]
            seq, messages, is_current = await self._follow(connection, user_id, state["seq"])
            if is_current and place is not None:
                page = await connection.fetchrow(_FILL, user_id, place, self.piece)
                assert page is not None
                place = page["last"] if page["messages"] == self.piece else None
                messages += page["messages"]
            await connection.execute(_MOVE, user_id, seq, place)
            return messages, is_current and place is None

    async def _follow(self, connection: Connection, user_id: str, seq: int) -> tuple[int, int, bool]:
        """Up to which change all is done, how many messages that was, and whether it is the last one."""
        row = await connection.fetchrow(_FOLLOW, user_id, seq, self.piece)
        if row is None:
            return seq, 0, True
        if row["chats"]:
            await connection.execute(_UNSHOWN, user_id, row["chats"])
            most = _AGAIN * self.piece
            again = await connection.execute(_SHOWN_AGAIN, user_id, row["chats"], most)
            if again == f"INSERT 0 {most}":
                return seq, most, False
        return row["last"], row["messages"], row["is_current"]
