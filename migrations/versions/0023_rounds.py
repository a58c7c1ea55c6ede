"""How far the comparison of the index with what it is made of has come, and what it has found."""

from alembic import op

revision = "0023"
down_revision = "0022"

ROUNDS = [
    # One row per source, and one of our own chats. `compared` and `drift` are of the round under way, else of the last.
    """
    create table conversation_rounds (
        source text primary key,
        place jsonb,
        began_at timestamptz,
        ended_at timestamptz,
        compared bigint not null default 0,
        drift bigint not null default 0,
        error_code text,
        error text
    )
    """,
    """
    create or replace view crew_discovery_state as
    select c.code as crew_code, c.id as source, c.client, c.is_enabled, s.last_discovered_at,
        coalesce(s.last_session_count, 0) as last_session_count, coalesce(s.last_rows, 0) as last_rows,
        coalesce(s.last_seconds, 0) as last_seconds, s.last_complete_at,
        extract(epoch from parley_now() - s.last_complete_at)::float8 as lag_seconds,
        (select coalesce(sum(n.conversations), 0)::bigint from conversation_counts n where n.source = c.id)
            as conversation_count,
        coalesce(s.rows, 0) as row_count, coalesce(s.skipped, '{}') as skipped,
        coalesce(s.failures, 0) as consecutive_failures, s.error_code as last_error_code, s.error as last_error,
        nullif(s.settled, -9223372036854775808) as watermark, r.ended_at as reconciled_at,
        coalesce(r.drift, 0) as drift
    from conversation_sources c left join conversation_source_state s on s.source = c.id
    left join conversation_rounds r on r.source = c.id
    """,
]


def upgrade() -> None:
    for statement in ROUNDS:
        op.execute(statement)


def downgrade() -> None:
    raise NotImplementedError("Parley's migrations only go forward; restore a backup to go back.")
