"""What administrators did: one row per action, kept for PARLEY_KEEP_AUDIT_DAYS."""

from alembic import op

revision = "0013"
down_revision = "0012"

# No key on the clock: several may act in one moment.
AUDIT = [
    """
    create table audit (
        id bigint generated always as identity primary key,
        at timestamptz not null default parley_now(),
        actor text not null,
        action text not null,
        target text not null,
        detail text not null default '',
        request_id text
    )
    """,
    "create index audit_age on audit (at)",
]


def upgrade() -> None:
    for statement in AUDIT:
        op.execute(statement)


def downgrade() -> None:
    raise NotImplementedError("Parley's migrations only go forward; restore a backup to go back.")
