"""Pictures that users send: checked, encoded anew, stored once per user."""

from alembic import op

revision = "0003"
down_revision = "0002"

IMAGES = [
    # An empty user_id is a picture uploaded without one. sha256 is of the stored bytes.
    """
    create table images (
        id uuid primary key,
        user_id text not null,
        sha256 bytea not null,
        mime text not null check (mime in ('image/png', 'image/jpeg', 'image/webp')),
        width int not null,
        height int not null,
        bytes int not null,
        name text,
        data bytea not null,
        created_at timestamptz not null default now(),
        updated_at timestamptz not null default now(),
        unique (user_id, sha256)
    )
    """,
    # Compressed already: PostgreSQL's own compression would only cost time.
    "alter table images alter column data set storage external",
]


def upgrade() -> None:
    for statement in IMAGES:
        op.execute(statement)


def downgrade() -> None:
    raise NotImplementedError("Parley's migrations only go forward; restore a backup to go back.")
