"""The event log, the chats, and what operators look at."""

from alembic import op

revision = "0001"
down_revision = None

CLOCK = """
create function parley_now() returns timestamptz language sql stable as $$
    select coalesce(nullif(current_setting('parley.now', true), '')::timestamptz, now())
$$
"""

# The log unit: replicas, streaming_sessions and streaming_events. stream_id (or the replica's id) leads every
# key and nothing references across, so that the three can move to other servers by stream id one day.
LOG = [
    """
    create table replicas (
        id uuid primary key,
        alive boolean not null default true,
        url text,
        version text not null,
        started_at timestamptz not null default now()
    )
    """,
    """
    create table replica_beats (
        replica_id uuid primary key,
        beat_at timestamptz not null
    ) with (fillfactor = 50)
    """,
    """
    create table streaming_sessions (
        id uuid primary key,
        user_id text not null,
        session_id text not null,
        chatbot_id text not null,
        chatbot_version int not null,
        flow_type text not null,
        status text not null check (status in ('queued', 'active', 'completed', 'failed', 'cancelled')),
        replica_id uuid,
        attempt int not null default 1,
        last_event_id int,
        created_at timestamptz not null default now(),
        ended_at timestamptz
    )
    """,
    """
    create index streaming_sessions_unfinished on streaming_sessions (replica_id)
        where status in ('queued', 'active')
    """,
    """
    create table streaming_events (
        stream_id uuid not null,
        id int not null,
        payload text not null,
        created_at timestamptz not null default now(),
        primary key (stream_id, id)
    ) partition by range (stream_id)
    """,
    "alter table streaming_events alter column payload set storage external",
]

CHATS = [
    """
    create table chats (
        user_id text not null,
        id text not null,
        title text not null default '' check (char_length(title) <= 500),
        "timestamp" timestamptz not null default now(),
        parent_chat_id text,
        branch_from_message_id text,
        is_deleted boolean not null default false,
        created_at timestamptz not null default now(),
        updated_at timestamptz not null default now(),
        primary key (user_id, id)
    )
    """,
    """
    create table messages (
        user_id text not null,
        id text not null,
        chat_id text not null,
        content text not null,
        role text not null check (role in ('user', 'assistant', 'system')),
        "timestamp" timestamptz not null default now(),
        position int not null,
        attachments text not null default '[]',
        status text not null default 'complete' check (status in ('complete', 'partial', 'failed')),
        is_deleted boolean not null default false,
        created_at timestamptz not null default now(),
        updated_at timestamptz not null default now(),
        primary key (user_id, id)
    )
    """,
    "create index messages_of_chat on messages (user_id, chat_id, position)",
    """
    create table usage_ledger (
        stream_id uuid not null,
        flow text not null,
        attempt int not null,
        user_id text not null,
        chatbot_id text not null,
        provider text not null,
        model text not null,
        outcome text not null,
        prompt_tokens int not null,
        completion_tokens int not null,
        first_token_ms int,
        duration_ms int not null,
        created_at timestamptz not null default now(),
        primary key (stream_id, flow, attempt)
    )
    """,
]

PROCESSING = [
    """
    create table chatbots (
        id text not null,
        version int not null,
        configuration text not null,
        created_at timestamptz not null default now(),
        primary key (id, version)
    )
    """,
    """
    create table conversation_sessions (
        user_id text not null,
        id text not null,
        chatbot_id text not null,
        status text not null default 'idle' check (status in ('idle', 'active')),
        streaming_session_id uuid,
        created_at timestamptz not null default now(),
        updated_at timestamptz not null default now(),
        primary key (user_id, id)
    )
    """,
    """
    create table idempotency_keys (
        principal text not null,
        route text not null,
        key text not null,
        fingerprint text not null,
        answer text not null,
        created_at timestamptz not null default now(),
        primary key (principal, route, key)
    )
    """,
    "create index idempotency_keys_age on idempotency_keys (created_at)",
]

JOURNAL = [
    """
    create table error_logs (
        id uuid primary key,
        category text not null,
        code text not null,
        message text not null,
        request_id text,
        stream_id uuid,
        created_at timestamptz not null default now()
    )
    """,
    "create index error_logs_age on error_logs (created_at)",
    """
    create table conversation_processing_metrics (
        stream_id uuid primary key,
        session_id text not null,
        chatbot_id text not null,
        flow_type text not null,
        status text not null,
        error_code text,
        provider text,
        model text,
        events int not null,
        prompt_tokens int not null,
        completion_tokens int not null,
        first_token_ms int,
        duration_ms int not null,
        created_at timestamptz not null default now()
    )
    """,
    "create index conversation_processing_metrics_age on conversation_processing_metrics (created_at)",
]


def upgrade() -> None:
    for statement in [CLOCK, *LOG, *CHATS, *PROCESSING, *JOURNAL]:
        op.execute(statement)


def downgrade() -> None:
    raise NotImplementedError("Parley's migrations only go forward; restore a backup to go back.")
