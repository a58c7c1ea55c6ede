"""What another replica needs to begin a run again, and the rows it finds it by."""

from alembic import op

revision = "0004"
down_revision = "0003"

# What a message brought besides its rows, while its stream has not ended: as in queued_messages.request.
TAKEOVER = [
    "alter table streaming_sessions add column request text",
    # A long history: PostgreSQL's compression would cost more time than it saves room, for so short a life.
    "alter table streaming_sessions alter column request set storage external",
]

# How many answers of a user are under way, asked by every accept.
ADMISSION = [
    "create index conversation_sessions_active on conversation_sessions (user_id) where status = 'active'",
]


def upgrade() -> None:
    for statement in [*TAKEOVER, *ADMISSION]:
        op.execute(statement)


def downgrade() -> None:
    raise NotImplementedError("Parley's migrations only go forward; restore a backup to go back.")
