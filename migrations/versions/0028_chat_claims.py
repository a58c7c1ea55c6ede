"""Whose chats were taken over, and by whom: each user's once."""

from alembic import op

revision = "0028"
down_revision = "0027"

OTHERS = r"(select current_user not like 'parley\_users\_%')"
ME = "(select nullif(current_setting('parley.user_id', true), ''))"

STATEMENTS = [
    # user_id has them now.
    """
    create table chat_claims (
        from_user_id text primary key,
        user_id text not null,
        created_at timestamptz not null default now()
    )
    """,
    "create index chat_claims_of_user on chat_claims (user_id)",
    "alter table chat_claims enable row level security",
    f"create policy others on chat_claims using ({OTHERS})",
    f"create policy users on chat_claims using (user_id = {ME})",
]


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    raise NotImplementedError("Parley's migrations only go forward; restore a backup to go back.")
