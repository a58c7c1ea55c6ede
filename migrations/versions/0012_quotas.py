"""Daily quotas: what every subject has used and reserved, and what each unfinished stream has reserved."""

from alembic import op

revision = "0012"
down_revision = "0011"

# As in 0011: every role but ours, and the user of a request.
OTHERS = r"(select current_user not like 'parley\_users\_%')"
ME = "(select nullif(current_setting('parley.user_id', true), ''))"

# Whoever takes a message out of the queue gives back what it held: of the user, of a key and of a chatbot.
SECURITY = [
    "alter table quota_usage enable row level security",
    f"create policy others on quota_usage using ({OTHERS})",
    f"""
    create policy users on quota_usage
    using (subject = 'user:' || {ME} or (subject not like 'user:%' and {ME} is not null))
    """,
]

QUOTAS = [
    # A row for each subject that has a quota, and each day (UTC) on which it was asked for; kept for some weeks. The
    # quotas are those it was checked against last.
    """
    create table quota_usage (
        day date not null,
        subject text not null,
        messages_used bigint not null default 0,
        messages_reserved bigint not null default 0,
        tokens_used bigint not null default 0,
        tokens_reserved bigint not null default 0,
        messages_quota bigint,
        tokens_quota bigint,
        primary key (day, subject)
    ) with (fillfactor = 50)
    """,
    # Null where nothing is reserved. As many subjects as tokens: what each is given back when the stream ends.
    """
    alter table streaming_sessions
        add column quota_day date, add column quota_subjects text[], add column quota_tokens bigint[]
    """,
    # Null: as the settings say.
    "alter table api_keys add column daily_messages bigint, add column daily_tokens bigint",
]


def upgrade() -> None:
    for statement in [*QUOTAS, *SECURITY]:
        op.execute(statement)


def downgrade() -> None:
    raise NotImplementedError("Parley's migrations only go forward; restore a backup to go back.")
