"""The time of a conversation's last message beside its words, so that searches read no other table; the filters of a
user's list in that list's index."""

from alembic import op

revision = "0024"
down_revision = "0023"

# Written anew rather than changed row by row, which would leave as much room again unused; rights and policies stay.
# The version before writes words without a time: then it is that of the writing, which is about the same.
WORDS = [
    """
    create temporary table spoken on commit drop as
    select w.conversation, w.username, c.last_message_at as said_at, w.words
    from conversation_words w join conversations c on c.id = w.conversation
    """,
    "drop index conversation_words_found",
    "truncate conversation_words",
    "alter table conversation_words add column said_at timestamptz not null default now()",
    """
    insert into conversation_words (conversation, username, said_at, words)
    select conversation, username, said_at, words from spoken order by said_at
    """,
    "create index conversation_words_said on conversation_words (said_at desc, conversation desc)",
    "create index conversation_words_found on conversation_words using gin (words) with (fastupdate = off)",
]
# Rows that have another model are passed over without being read.
OF_USER = [
    "drop index conversations_of_user",
    """
    create index conversations_of_user on conversations (username, last_message_at desc, id desc)
        include (model, chatbot_id, source)
    """,
]


def upgrade() -> None:
    for statement in [*WORDS, *OF_USER]:
        op.execute(statement)


def downgrade() -> None:
    raise NotImplementedError("Parley's migrations only go forward; restore a backup to go back.")
