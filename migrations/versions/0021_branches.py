"""Which chats branch off from a chat."""

from alembic import op

revision = "0021"
down_revision = "0020"


def upgrade() -> None:
    op.execute("create index chats_of_parent on chats (user_id, parent_chat_id, id) where parent_chat_id is not null")


def downgrade() -> None:
    raise NotImplementedError("Parley's migrations only go forward; restore a backup to go back.")
