"""What users have used, added up by day from usage_ledger."""

from alembic import op

revision = "0025"
down_revision = "0024"

OTHERS = r"(select current_user not like 'parley\_users\_%')"
ME = "(select nullif(current_setting('parley.user_id', true), ''))"

STATEMENTS = [
    # A constant, so no row is rewritten; also of rows that the version before writes. All that is there is added up in
    # the first passes.
    "alter table usage_ledger add column is_added_up boolean not null default false",
    "create index usage_ledger_fresh on usage_ledger (user_id) where not is_added_up",
    """
    create table user_usage_daily (
        user_id text not null,
        day date not null,
        chatbot_id text not null,
        model text not null,
        calls bigint not null,
        failed bigint not null,
        prompt_tokens bigint not null,
        completion_tokens bigint not null,
        duration_ms bigint not null,
        created_at timestamptz not null default now(),
        updated_at timestamptz not null default now(),
        primary key (user_id, day, chatbot_id, model)
    ) with (fillfactor = 80)
    """,
    "create index user_usage_daily_days on user_usage_daily (day)",
    "alter table user_usage_daily enable row level security",
    f"create policy others on user_usage_daily using ({OTHERS})",
    f"create policy users on user_usage_daily using (user_id = {ME})",
]


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    raise NotImplementedError("Parley's migrations only go forward; restore a backup to go back.")
