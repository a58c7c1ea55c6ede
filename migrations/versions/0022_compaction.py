"""Deleted chats become empty, and failed messages go, after their time."""

from alembic import op

revision = "0022"
down_revision = "0021"

STATEMENTS = [
    # What the clean-up of failed messages has reached; only devices that ask for those are concerned. Locked before
    # `chats`, as whoever writes chats does.
    "alter table sync_head add column gc_failed bigint not null default 0",
    # A purged chat whose messages are all gone, too.
    "alter table chats add column is_emptied boolean not null default false",
    "create index chats_deleted on chats (updated_at) where is_deleted and not is_emptied",
    "create index messages_failed on messages (updated_at) where status = 'failed' and not is_deleted",
]


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    raise NotImplementedError("Parley's migrations only go forward; restore a backup to go back.")
