"""What operators see of discovery, by the sources as they are configured; and the webhooks that have been received."""

from alembic import op

revision = "0020"
down_revision = "0019"

STATE = [
    "drop view crew_discovery_state",
    """
    create view crew_discovery_state as
    select c.code as crew_code, c.id as source, c.client, c.is_enabled, s.last_discovered_at,
        coalesce(s.last_session_count, 0) as last_session_count, coalesce(s.last_rows, 0) as last_rows,
        coalesce(s.last_seconds, 0) as last_seconds, s.last_complete_at,
        extract(epoch from parley_now() - s.last_complete_at)::float8 as lag_seconds,
        (select coalesce(sum(n.conversations), 0)::bigint from conversation_counts n where n.source = c.id)
            as conversation_count,
        coalesce(s.rows, 0) as row_count, coalesce(s.skipped, '{}') as skipped,
        coalesce(s.failures, 0) as consecutive_failures, s.error_code as last_error_code, s.error as last_error,
        nullif(s.settled, -9223372036854775808) as watermark, s.reconciled_at, coalesce(s.drift, 0) as drift
    from conversation_sources c left join conversation_source_state s on s.source = c.id
    """,
    # Signatures are good for minutes; an id is kept for an hour, and passes of discovery take the older ones away.
    """
    create table webhook_receipts (
        id text primary key check (octet_length(id) <= 256),
        received_at timestamptz not null default parley_now()
    )
    """,
    "create index webhook_receipts_old on webhook_receipts (received_at)",
]


def upgrade() -> None:
    for statement in STATE:
        op.execute(statement)


def downgrade() -> None:
    raise NotImplementedError("Parley's migrations only go forward; restore a backup to go back.")
