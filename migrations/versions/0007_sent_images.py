"""Which pictures messages name: those stay, and the others go after a time."""

from alembic import op

revision = "0007"
down_revision = "0006"

# Users may write an image's id in many ways, so only its digits are compared.
SENT = [
    "alter table images add column sent boolean not null default false",
    """
    update images set sent = true where replace(id::text, '-', '') in (
        select right(regexp_replace(lower(named.id), '[^0-9a-f]', '', 'g'), 32) from (
            select substring(attachments from '"type":"image","id":"([^"]*)"') from messages
            where attachments like '[{"type":"image"%'
            union all select substring(request from '"image_id":"([^"]*)"') from queued_messages) named(id))
    """,
    "drop index images_age",
    "create index images_age on images (updated_at) where not sent",
]


def upgrade() -> None:
    for statement in SENT:
        op.execute(statement)


def downgrade() -> None:
    raise NotImplementedError("Parley's migrations only go forward; restore a backup to go back.")
