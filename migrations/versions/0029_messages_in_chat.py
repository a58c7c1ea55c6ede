"""The index of a chat's messages begins with the chat.

It began with the user, as the primary key does. Of a table that was not analysed yet the planner took it for as good a
way to a message by its id, and read all of the user's messages for each of those that a push named.
"""

from alembic import op

revision = "0029"
down_revision = "0028"


def upgrade() -> None:
    op.execute("create index messages_in_chat on messages (chat_id, user_id, position)")
    op.execute("drop index messages_of_chat")


def downgrade() -> None:
    raise NotImplementedError("Parley's migrations only go forward; restore a backup to go back.")
