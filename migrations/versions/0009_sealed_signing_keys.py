"""Signing keys may be encrypted with a master key, which makes them longer."""

from alembic import op

revision = "0009"
down_revision = "0008"

# Such a key is none for the version before; it gets there only once somebody has set a master key.
SEALED = [
    """
    alter table signing_keys drop constraint signing_keys_material_check,
        add constraint signing_keys_material_check check (octet_length(material) between 32 and 512)
    """,
]


def upgrade() -> None:
    for statement in SEALED:
        op.execute(statement)


def downgrade() -> None:
    raise NotImplementedError("Parley's migrations only go forward; restore a backup to go back.")
