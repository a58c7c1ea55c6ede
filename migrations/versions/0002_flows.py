"""Many flows in one answer: attempts, what errors were about, templates, stop requests and waiting messages."""

from alembic import op

revision = "0002"
down_revision = "0001"

RECORDS = [
    "alter table usage_ledger add column error_code text, add column started_at timestamptz",
    """
    alter table conversation_processing_metrics
        add column mode text not null default 'sequential',
        add column attempts int not null default 1,
        add column tokens_per_s real,
        add column flows text not null default '{}'
    """,
    """
    alter table error_logs
        add column fingerprint text,
        add column session_id text,
        add column chatbot_id text,
        add column flow text,
        add column attempt int,
        add column context text not null default '{}',
        add column stack text
    """,
]

# A template's versions are kept for ever: they are few, and old chatbot versions name them.
TEMPLATES = [
    """
    create table prompt_templates (
        name text not null,
        version int not null,
        text text not null,
        created_at timestamptz not null default now(),
        primary key (name, version)
    )
    """,
    """
    create table flow_template_assignments (
        chatbot_id text not null,
        chatbot_version int not null,
        flow text not null,
        template text not null,
        template_version int not null,
        created_at timestamptz not null default now(),
        primary key (chatbot_id, chatbot_version, flow)
    )
    """,
]

# cancel_flows: null while nobody asked for a stop, '{}' for the whole run, else the flows to stop.
STOPPING = [
    "alter table streaming_sessions add column cancel_flows text[]",
    # Only for streams that end when nobody reads them: after how many seconds, and when another replica saw a reader.
    "alter table streaming_sessions add column abandon_s real, add column read_at timestamptz",
    """
    create index streaming_sessions_cancelled on streaming_sessions (replica_id)
        where cancel_flows is not null and status in ('queued', 'active')
    """,
]

# A waiting message's text lives here alone until its turn comes. Bounded per session when it is written.
QUEUE = [
    """
    create table queued_messages (
        user_id text not null,
        session_id text not null,
        message_id text not null,
        stream_id uuid not null unique,
        place bigint not null,
        chatbot_id text not null,
        text text not null,
        request text not null,
        created_at timestamptz not null default now(),
        updated_at timestamptz not null default now(),
        primary key (user_id, session_id, message_id)
    )
    """,
    "create unique index queued_messages_place on queued_messages (user_id, session_id, place)",
]

# Configurations of the first format: one flow named main, with one endpoint.
CHATBOTS = """
update chatbots set configuration = (
    select json_build_object(
        'flows', json_build_object('main', json_build_object(
            'choices', json_build_array(json_build_object(
                'endpoint', main -> 'endpoint', 'model', main -> 'model', 'parameters', main -> 'parameters')),
            'system', main -> 'system')),
        'answers', json_build_array('main'),
        'plan', json_build_array(json_build_array(json_build_object('flow', 'answer'))),
        'allow', json_build_object('temperature', old -> 'temperature'))::text
    from (select configuration::json as old, configuration::json -> 'flows' -> 'main' as main) c)
where configuration::json -> 'answers' is null
"""


def upgrade() -> None:
    for statement in [*RECORDS, *TEMPLATES, *STOPPING, *QUEUE, CHATBOTS]:
        op.execute(statement)


def downgrade() -> None:
    raise NotImplementedError("Parley's migrations only go forward; restore a backup to go back.")
