"""conversation_sessions: the processing state of one chat. Its row is the first lock of every accept and end."""

from uuid import UUID

from app.postgres import Connection
from app.streams.stream import NEW_ID, random_part

# The stream's id is drawn here, so that the row names its stream from the first moment.
_OCCUPY = f"""
insert into conversation_sessions (user_id, id, chatbot_id, status, streaming_session_id)
values ($1, $2, $3, 'active', {NEW_ID.format(random_part="$4")})
on conflict (user_id, id) do update set
    status = 'active', chatbot_id = excluded.chatbot_id,
    streaming_session_id = excluded.streaming_session_id, updated_at = now()
where conversation_sessions.status = 'idle' and not exists (
    select from queued_messages q where q.user_id = excluded.user_id and q.session_id = excluded.id)
returning streaming_session_id, (xmax = 0) as created
"""
_REOCCUPY = """
update conversation_sessions set status = 'active', streaming_session_id = $3, updated_at = now()
where user_id = $1 and id = $2 and status = 'idle'
returning 1
"""
_LOCK = "select streaming_session_id from conversation_sessions where user_id = $1 and id = $2 for update"
_RELEASE = """
update conversation_sessions set status = 'idle', streaming_session_id = null, updated_at = now()
where user_id = $1 and id = $2 and streaming_session_id = $3
"""


async def occupy(connection: Connection, *, user_id: str, session_id: str, chatbot_id: str) -> tuple[UUID, bool] | None:
    """Take the session for one answer: the id of its stream, and whether the session is new.

    None while another answer runs or messages wait; the session's row is locked all the same.
    """
    row = await connection.fetchrow(_OCCUPY, user_id, session_id, chatbot_id, random_part())
    return None if row is None else (row["streaming_session_id"], row["created"])


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
