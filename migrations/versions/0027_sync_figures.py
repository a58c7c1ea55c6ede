"""Figures of exchanges per user and hour; users' deletions of chats are on record."""

from alembic import op

revision = "0027"
down_revision = "0026"

OTHERS = r"(select current_user not like 'parley\_users\_%')"
ME = "(select nullif(current_setting('parley.user_id', true), ''))"

STATEMENTS = [
    """
    create table sync_hours (
        user_id text not null,
        hour timestamptz not null,
        exchanges bigint not null,
        refused bigint not null,
        mutations bigint not null,
        rows_written bigint not null,
        conflicts bigint not null,
        resyncs bigint not null,
        bytes_up bigint not null,
        bytes_down bigint not null,
        duration_ms float8 not null,
        created_at timestamptz not null default now(),
        primary key (user_id, hour)
    ) with (fillfactor = 80)
    """,
    "create index sync_hours_age on sync_hours (hour)",
    "alter table sync_hours enable row level security",
    f"create policy others on sync_hours using ({OTHERS})",
    f"create policy users on sync_hours using (user_id = {ME})",
    # Behind the wall a request may note what it does. There is no policy by which it reads.
    "alter table audit enable row level security",
    f"create policy others on audit using ({OTHERS})",
    "create policy noting on audit for insert with check (true)",
]


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    raise NotImplementedError("Parley's migrations only go forward; restore a backup to go back.")
