"""conversation_sessions: the processing state of one chat. Its row is the first lock of every accept and end."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from uuid import UUID

from app.chats.head import advanced, moved
from app.expiry import Expired
from app.flows.chatbots import Chatbots
from app.postgres import Connection, Pool
from app.streams.stream import NEW_ID, random_part

# Held to the end of the transaction, so that those who come at once are counted one after the other. PostgreSQL knows
# it by a number only.
_USER_LOCK = "select pg_advisory_xact_lock(hashtextextended($1, 0))"
# The stream's id is drawn here, so that the row names its stream from the first moment. What is counted is what there
# was before the statement: it is all there is, unless somebody else has moved the user's counter since (`seen`).
_OCCUPY = f"""
with session as (
    insert into conversation_sessions (user_id, id, chatbot_id, status, streaming_session_id)
    values ($1, $2, $3, 'active', {NEW_ID.format(random_part="$4")})
    on conflict (user_id, id) do update set
        status = 'active', chatbot_id = excluded.chatbot_id,
        streaming_session_id = excluded.streaming_session_id, updated_at = now()
    where conversation_sessions.status = 'idle' and not exists (
        select from queued_messages q where q.user_id = excluded.user_id and q.session_id = excluded.id)
    returning streaming_session_id),
head as ({advanced("select $1, 1 from session where $1 <> ''")})
select streaming_session_id as stream_id, coalesce((select seq from head), 0) as seq,
    coalesce((select seq from sync_head where user_id = $1), 0) as seen,
    (select count(*) from conversation_sessions where user_id = $1 and status = 'active' and id <> $2) as others
from session
"""
_ACTIVE_ELSEWHERE = """
select count(*) from conversation_sessions where user_id = $1 and status = 'active' and id is distinct from $2
"""
_REOCCUPY = """
update conversation_sessions set status = 'active', streaming_session_id = $3, updated_at = now()
where user_id = $1 and id = $2 and status = 'idle'
returning 1
"""
_LOCK = "select streaming_session_id from conversation_sessions where user_id = $1 and id = $2 for update"
# A session that messages wait in is not idle for long: the next pass of the turns finds it.
_EXPIRED = """
select ctid, updated_at from conversation_sessions s
where chatbot_id = $1 and status = 'idle' and updated_at < parley_now() - make_interval(secs => $2)
    and not exists (select from queued_messages q where q.user_id = s.user_id and q.session_id = s.id)
order by updated_at limit $3
"""
_COUNT_EXPIRED = f"""
select count(*) as rows, extract(epoch from parley_now() - min(updated_at))::float8 as age_s from ({_EXPIRED}) e
"""
_DELETE_EXPIRED = f"""
delete from conversation_sessions where ctid = any(array(select ctid from ({_EXPIRED} for update skip locked) e))
"""
_RELEASE = """
update conversation_sessions set status = 'idle', streaming_session_id = null, updated_at = now()
where user_id = $1 and id = $2 and streaming_session_id = $3
"""


@dataclass(frozen=True, slots=True)
class Occupied:
    """For which stream, and the change to the user's chats that is made with it (app/chats/head.py).

    `others`: the user's other sessions with an answer under way; None: somebody was faster, and they are to be counted.
    """

    stream_id: UUID
    seq: int
    others: int | None


async def occupy(connection: Connection, *, user_id: str, session_id: str, chatbot_id: str) -> Occupied | None:
    """Take the session for one answer, and lock the user's chats.

    None while another answer runs or messages wait; the session's row is locked all the same.
    """
    row = await connection.fetchrow(_OCCUPY, user_id, session_id, chatbot_id, random_part())
    if row is None:
        return None
    if row["seq"]:
        moved(user_id, row["seq"])
    is_exact = row["seq"] == row["seen"] + 1
    return Occupied(row["stream_id"], row["seq"], row["others"] if is_exact else None)


async def active_elsewhere(connection: Connection, *, user_id: str, session_id: str | None) -> int:
    """The user's other sessions with an answer under way. Exact behind `occupy`, else perhaps out of date."""
    count: int = await connection.fetchval(_ACTIVE_ELSEWHERE, user_id, session_id)
    return count


async def one_at_a_time(connection: Connection, *, user_id: str) -> None:
    """Have everybody else wait who queues a message of this user, until the transaction ends."""
    await connection.execute(_USER_LOCK, user_id)


async def reoccupy(connection: Connection, *, user_id: str, session_id: str, stream_id: UUID) -> bool:
    """Take an idle session for a stream that has waited; false where it is not idle any more."""
    return await connection.fetchval(_REOCCUPY, user_id, session_id, stream_id) is not None


async def lock(connection: Connection, *, user_id: str, session_id: str) -> UUID | None:
    """Keep everybody else's hands off the session until the transaction ends; the stream that is under way."""
    running: UUID | None = await connection.fetchval(_LOCK, user_id, session_id)
    return running


async def release(connection: Connection, *, user_id: str, session_id: str, stream_id: UUID) -> None:
    """Free the session, if it is still this stream that occupies it."""
    await connection.execute(_RELEASE, user_id, session_id, stream_id)


@dataclass(frozen=True, slots=True)
class Sessions:
    """Idle sessions of every chatbot, each after its own time. Their chats stay: a later message finds its history."""

    chatbots: Chatbots
    keep_s: float
    table: str = "conversation_sessions"

    async def expired(self, pool: Pool, most: int) -> Expired:
        rows, late_s = 0, 0.0
        async for chatbot_id, keep_s in self._kept():
            row = await pool.fetchrow(_COUNT_EXPIRED, chatbot_id, keep_s, most - rows)
            assert row is not None
            rows += row["rows"]
            late_s = max(late_s, (row["age_s"] or 0) - keep_s)
        return Expired(rows, late_s)

    async def clean(self, pool: Pool, most: int) -> int:
        cleaned = 0
        async for chatbot_id, keep_s in self._kept():
            done = await pool.execute(_DELETE_EXPIRED, chatbot_id, keep_s, most - cleaned)
            cleaned += int(done.removeprefix("DELETE "))
        return cleaned

    async def _kept(self) -> AsyncGenerator[tuple[str, float], None]:
        """Every chatbot and for how many seconds its idle sessions are kept."""
        for chatbot_id, chatbot in (await self.chatbots.all()).items():
            days = chatbot.keep_sessions_days
            yield chatbot_id, self.keep_s if days is None else days * 86400
