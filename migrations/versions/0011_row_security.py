"""Row security: what the role of users' requests sees (docs/decisions/0009). Nobody else notices."""

from alembic import op

revision = "0011"
down_revision = "0010"

# Every role but ours: its rights are its grants alone, as before. The owner of the tables is not asked at all.
OTHERS = r"(select current_user not like 'parley\_users\_%')"
# Once per statement, and nobody where nobody is set: after a transaction PostgreSQL leaves an empty text behind.
ME = "(select nullif(current_setting('parley.user_id', true), ''))"
# The streams that a token opens, and those that a statement is about. The outer cast makes it an array, not a query.
LEAVE = "(select nullif(current_setting('parley.leave', true), '')::uuid[])::uuid[]"
NAMED = "(select nullif(current_setting('parley.streams', true), '')::uuid[])::uuid[]"

# In the order in which a running server locks them.
OWNED = ("conversation_sessions", "queued_messages", "chats", "messages", "usage_ledger")


def owned(table: str) -> list[str]:
    """What any table with a column user_id needs."""
    return [*secured(table), f"create policy users on {table} using (user_id = {ME})"]


def secured(table: str) -> list[str]:
    return [
        f"alter table {table} enable row level security",
        f"create policy others on {table} using ({OTHERS})",
    ]


STREAMS = f"create policy users on streaming_sessions using (user_id = {ME} or id = any({LEAVE}))"
# Events have no user. The streams are looked up once per statement, not once per event; both see the policy above.
EVENTS = [
    f"""
    create policy reading on streaming_events for select using (stream_id = any(array(
        select s.id from streaming_sessions s where s.id = any({NAMED}))))
    """,
    """
    create policy writing on streaming_events for insert with check (exists (
        select from streaming_sessions s where s.id = stream_id))
    """,
]
# A picture without a user is for every user who knows its id; none makes one so, or takes one away.
VISIBLE = f"user_id = {ME} or (user_id = '' and {ME} is not null)"
IMAGES = [
    f"create policy reading on images for select using ({VISIBLE})",
    f"create policy marking on images for update using ({VISIBLE})",
    f"create policy storing on images for insert with check (user_id = {ME})",
    f"create policy removing on images for delete using (user_id = {ME})",
]


def upgrade() -> None:
    statements = [statement for table in OWNED for statement in owned(table)]
    statements += [*secured("streaming_sessions"), STREAMS]
    statements += [*secured("streaming_events"), *EVENTS]
    statements += [*secured("images"), *IMAGES]
    for statement in statements:
        op.execute(statement)


def downgrade() -> None:
    raise NotImplementedError("Parley's migrations only go forward; restore a backup to go back.")
