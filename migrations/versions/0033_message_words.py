"""The words of every message, where a setting asks for them, and how far each user's are."""

from alembic import op

revision = "0033"
down_revision = "0032"

OTHERS = r"(select current_user not like 'parley\_users\_%')"
ME = "(select nullif(current_setting('parley.user_id', true), ''))"

STATEMENTS = [
    """
    create table message_words (
        username text not null,
        conversation_id text not null,
        message_id text not null,
        words tsvector not null,
        primary key (username, conversation_id, message_id)
    )
    """,
    # Without a list of what is pending, as that of conversations.
    "create index message_words_found on message_words using gin (words) with (fastupdate = off)",
    # The number of the last change that is in the words, and where the user's older messages are walked through; null
    # when they have been.
    """
    create table message_word_users (
        username text primary key,
        seq bigint not null,
        place text
    ) with (fillfactor = 70)
    """,
    # 0: there are none. `filled` since when they are complete.
    """
    alter table conversation_index add column message_words_version int not null default 0,
        add column message_words_filled_at timestamptz
    """,
]


def secured(table: str) -> list[str]:
    return [
        f"alter table {table} enable row level security",
        f"create policy others on {table} using ({OTHERS})",
        f"create policy users on {table} using (username = {ME})",
    ]


def upgrade() -> None:
    for statement in [*STATEMENTS, *secured("message_words"), *secured("message_word_users")]:
        op.execute(statement)


def downgrade() -> None:
    raise NotImplementedError("Parley's migrations only go forward; restore a backup to go back.")
