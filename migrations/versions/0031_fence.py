"""The fence of a transaction as a function, whose plan each connection keeps: as text it was planned every time."""

from alembic import op

revision = "0031"
down_revision = "0030"

STATEMENTS = [
    """
    create function parley_fence(owner uuid) returns void language plpgsql as $$
    begin
        perform from replicas where id = owner and alive for share;
        if not found then
            raise 'replica % was declared dead', owner using errcode = 'invalid_transaction_termination';
        end if;
    end
    $$
    """,
]


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    raise NotImplementedError("Parley's migrations only go forward; restore a backup to go back.")
