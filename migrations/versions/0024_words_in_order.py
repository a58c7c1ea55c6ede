"""The time of a conversation's last message beside its words, so that searches read no other table; the filters of a
user's list in that list's index."""

from alembic import op

revision = "0024"
down_revision = "0023"

# The version before goes on saving words, without a time: then it is that of the writing, which is about the same. Old
# ones get theirs when the index is built anew beside this one, as an index of an older version is by itself. Written
# here, a million of them would keep everybody waiting for half a minute.
WORDS = [
    "alter table conversation_words add column said_at timestamptz not null default now()",
    "create index conversation_words_said on conversation_words (said_at desc, conversation desc)",
    "update conversation_index set version = 2 where not exists (select from conversation_words)",
]
# Nobody builds the index anew meanwhile, from what these change: the lock of app/conversations/upkeep.py.
ALONE = "select pg_advisory_xact_lock(x'7061726c65790004'::bigint)"
# What one that was killed has left has an index of the same name.
LEFT = [
    "drop function if exists conversation_changed() cascade",
    "drop table if exists conversation_changes, conversations_next",
]
# Rows that have another model are passed over without being read. Readers wait only while names change.
OF_USER = [
    """
    create index conversations_of_user_next on conversations (username, last_message_at desc, id desc)
        include (model, chatbot_id, source)
    """,
    "drop index conversations_of_user",
    "alter index conversations_of_user_next rename to conversations_of_user",
]


def upgrade() -> None:
    for statement in [ALONE, *LEFT, *OF_USER, *WORDS]:
        op.execute(statement)


def downgrade() -> None:
    raise NotImplementedError("Parley's migrations only go forward; restore a backup to go back.")
