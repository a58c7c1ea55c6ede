"""Which version of a source's configuration the index holds the conversations of."""

from alembic import op

revision = "0018"
down_revision = "0017"


def upgrade() -> None:
    # Null where nothing was read yet.
    op.execute("alter table conversation_sources add column indexed_version int")


def downgrade() -> None:
    raise NotImplementedError("Parley's migrations only go forward; restore a backup to go back.")
