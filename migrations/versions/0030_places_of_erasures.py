"""Where an erasure stands, so that the next pass goes on there, and who was tried last."""

from alembic import op

revision = "0030"
down_revision = "0029"

STATEMENTS = [
    """
    alter table erasures
        add column tried_at timestamptz not null default parley_now(),
        add column walk text not null default '',
        add column block int not null default 0,
        add column found bigint not null default 0
    """,
]


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    raise NotImplementedError("Parley's migrations only go forward; restore a backup to go back.")
