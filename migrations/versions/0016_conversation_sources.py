"""Other programs' tables that the index of conversations reads, as they are configured."""

from alembic import op

revision = "0016"
down_revision = "0015"

# A few rows. version goes up when what is read changes: what was found before is of something else.
SOURCES = [
    r"""
    create table conversation_sources (
        id text primary key check (id <> 'parley'),
        version int not null default 1,
        code text not null unique,
        client text not null default '',
        dsn text not null check (dsn ~ '^(env:|file:)'),
        table_name text not null,
        kind text not null,
        columns text not null default '{}',
        conversation text not null default '',
        is_enabled boolean not null default true,
        created_at timestamptz not null default parley_now(),
        updated_at timestamptz not null default parley_now()
    )
    """,
]


def upgrade() -> None:
    for statement in SOURCES:
        op.execute(statement)


def downgrade() -> None:
    raise NotImplementedError("Parley's migrations only go forward; restore a backup to go back.")
