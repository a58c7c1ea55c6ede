"""What periodic jobs say of themselves, and the indexes by which old rows are found."""

from alembic import op

revision = "0005"
down_revision = "0004"

JOBS = [
    # One row per job of jobs/schedule.py; next_at is moved before a pass begins, so that no pass is begun twice.
    """
    create table job_runs (
        name text primary key,
        next_at timestamptz not null,
        started_at timestamptz,
        ended_at timestamptz,
        done bigint,
        failures int not null default 0,
        error text,
        replica_id uuid
    )
    """,
]
AGES = [
    "create index streaming_sessions_ended on streaming_sessions (ended_at) where ended_at is not null",
    "create index conversation_sessions_idle on conversation_sessions (chatbot_id, updated_at) where status = 'idle'",
    "create index queued_messages_age on queued_messages (created_at)",
    "create index images_age on images (updated_at)",
]


def upgrade() -> None:
    for statement in [*JOBS, *AGES]:
        op.execute(statement)


def downgrade() -> None:
    raise NotImplementedError("Parley's migrations only go forward; restore a backup to go back.")
