"""API keys."""

from alembic import op

revision = "0006"
down_revision = "0005"

ACCESS = [
    # As many rows as operators make. hash: SHA-256 of the key, which is shown once and kept nowhere.
    """
    create table api_keys (
        id text primary key,
        hash bytea not null check (octet_length(hash) = 32),
        name text not null,
        scopes text[] not null,
        created_at timestamptz not null default now(),
        used_at timestamptz,
        revoked_at timestamptz
    )
    """,
]


def upgrade() -> None:
    for statement in ACCESS:
        op.execute(statement)


def downgrade() -> None:
    raise NotImplementedError("Parley's migrations only go forward; restore a backup to go back.")
