"""How far each source of conversations was read, and what lets a conversation's rows come in any order."""

from alembic import op

revision = "0015"
down_revision = "0014"

STATE = [
    # The ranks that decide between a conversation's rows; of our own chats the newest decides, and they stay null.
    """
    alter table conversations
        add column chatbot_id_rank bigint, add column model_rank bigint, add column client_ip_rank bigint,
        add column message_ranks bigint[] not null default '{}'
    """,
    # `settled`, `seen`, `marks` and `sweep` change together with `version`, in the transaction that counts the rows.
    # `sweep` is of tables whose keys no sequence gives out. All else is what became of the last passes.
    """
    create table conversation_source_state (
        source text primary key,
        version bigint not null default 0,
        settled bigint not null default -9223372036854775808,
        seen int8multirange not null default '{}',
        marks jsonb not null default '[]',
        sweep jsonb not null default '{}',
        rows bigint not null default 0,
        skipped jsonb not null default '{}',
        last_discovered_at timestamptz,
        last_complete_at timestamptz,
        last_session_count int not null default 0,
        last_rows bigint not null default 0,
        last_seconds float8 not null default 0,
        passes bigint not null default 0,
        failures int not null default 0,
        error_code text,
        error text,
        reconciled_to bigint not null default 0,
        reconciled_at timestamptz,
        reconciled bigint not null default 0,
        drift bigint not null default 0
    )
    """,
    """
    create view crew_discovery_state as
    select source, last_discovered_at, last_session_count, last_rows, last_seconds, last_complete_at,
        extract(epoch from parley_now() - last_complete_at)::float8 as lag_seconds,
        (select coalesce(sum(n.conversations), 0)::bigint from conversation_counts n where n.source = s.source)
            as conversation_count,
        rows as row_count, skipped, failures as consecutive_failures, error_code as last_error_code,
        error as last_error, settled as watermark, reconciled_at, drift
    from conversation_source_state s
    """,
]


def upgrade() -> None:
    for statement in STATE:
        op.execute(statement)


def downgrade() -> None:
    raise NotImplementedError("Parley's migrations only go forward; restore a backup to go back.")
