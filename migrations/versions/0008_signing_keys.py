"""Keys that sign streaming URLs."""

from alembic import op

revision = "0008"
down_revision = "0007"

SIGNING = [
    # Two rows at most: the newest signs, the one before is still believed.
    """
    create table signing_keys (
        number int primary key,
        material bytea not null check (octet_length(material) = 32),
        created_at timestamptz not null default now()
    )
    """,
]


def upgrade() -> None:
    for statement in SIGNING:
        op.execute(statement)


def downgrade() -> None:
    raise NotImplementedError("Parley's migrations only go forward; restore a backup to go back.")
