"""Users who are being erased: a row for each until nothing of theirs is left."""

from alembic import op

revision = "0026"
down_revision = "0025"

OTHERS = r"(select current_user not like 'parley\_users\_%')"
ME = "(select nullif(current_setting('parley.user_id', true), ''))"

STATEMENTS = [
    """
    create table erasures (
        user_id text primary key,
        created_at timestamptz not null default parley_now(),
        passes int not null default 0
    )
    """,
    "alter table erasures enable row level security",
    f"create policy others on erasures using ({OTHERS})",
    f"create policy users on erasures using (user_id = {ME})",
]


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    raise NotImplementedError("Parley's migrations only go forward; restore a backup to go back.")
