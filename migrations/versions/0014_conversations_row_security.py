"""Row security for the index of conversations."""

from alembic import op

revision = "0014"
down_revision = "0013"

OTHERS = r"(select current_user not like 'parley\_users\_%')"
ME = "(select nullif(current_setting('parley.user_id', true), ''))"
OWNED = ("conversations", "conversation_days")


def secured(table: str) -> list[str]:
    return [
        f"alter table {table} enable row level security",
        f"create policy others on {table} using ({OTHERS})",
    ]


def upgrade() -> None:
    statements = []
    for table in OWNED:
        statements += [*secured(table), f"create policy users on {table} using (username = {ME})"]
    # Whether there is an index is no secret.
    statements += [*secured("conversation_index"), "create policy users on conversation_index for select using (true)"]
    for statement in statements:
        op.execute(statement)


def downgrade() -> None:
    raise NotImplementedError("Parley's migrations only go forward; restore a backup to go back.")
