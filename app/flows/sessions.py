"""conversation_sessions: the processing state of one chat. Its row is the first lock of every accept and end."""

from uuid import UUID

from app.errors import Conflict
from app.postgres import Connection

_OCCUPY = """
insert into conversation_sessions (user_id, id, chatbot_id, status) values ($1, $2, $3, 'active')
on conflict (user_id, id) do update set status = 'active', chatbot_id = excluded.chatbot_id, updated_at = now()
where conversation_sessions.status = 'idle'
returning (xmax = 0) as created
"""
_NAME_STREAM = "update conversation_sessions set streaming_session_id = $3 where user_id = $1 and id = $2"
_RELEASE = """
update conversation_sessions set status = 'idle', streaming_session_id = null, updated_at = now()
where user_id = $1 and id = $2 and streaming_session_id = $3
"""


async def occupy(connection: Connection, *, user_id: str, session_id: str, chatbot_id: str) -> bool:
    """Take the session for one answer; returns whether it is new. Raises Conflict while another answer runs."""
    created = await connection.fetchval(_OCCUPY, user_id, session_id, chatbot_id)
    if created is None:
        raise Conflict(
            "session_busy", "An answer is under way in this session; wait for its stream_end, then send again."
        )
    return bool(created)


async def name_stream(connection: Connection, *, user_id: str, session_id: str, stream_id: UUID) -> None:
    """Note which stream the session is occupied by."""
    await connection.execute(_NAME_STREAM, user_id, session_id, stream_id)


async def release(connection: Connection, *, user_id: str, session_id: str, stream_id: UUID) -> None:
    """Free the session, if it is still this stream that occupies it."""
    await connection.execute(_RELEASE, user_id, session_id, stream_id)
