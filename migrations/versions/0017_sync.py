"""What devices synchronise chats by: a counter of changes per user, and its number on every row."""

from alembic import op

revision = "0017"
down_revision = "0016"

OTHERS = r"(select current_user not like 'parley\_users\_%')"
ME = "(select nullif(current_setting('parley.user_id', true), ''))"

# Constants, so no row is rewritten. Rows with seq 0 get one when a device of their user first asks for everything.
COLUMNS = [
    """
    alter table chats add column seq bigint not null default 0, add column origin text not null default '',
        add column stamp text not null default '000000000000-0000', add column client text not null default '',
        add column is_purged boolean not null default false
    """,
    """
    alter table messages add column seq bigint not null default 0, add column origin text not null default '',
        add column stamp text not null default '000000000000-0000', add column parent_id text,
        add column is_asked boolean not null default true
    """,
    # Only for what asks by seq: a look-up by id would else find them as good as the primary key while a table is small.
    "create index chats_changed on chats (user_id, seq) where seq > 0",
    "create index messages_changed on messages (user_id, seq) where seq > 0",
]
TABLES = [
    """
    create table sync_head (
        user_id text primary key,
        epoch text not null default left(replace(gen_random_uuid()::text, '-', ''), 12),
        seq bigint not null default 0,
        gc_seq bigint not null default 0,
        clients text not null default '{}',
        created_at timestamptz not null default now()
    ) with (fillfactor = 50)
    """,
    """
    create table chat_versions (
        user_id text not null,
        chat_id text not null,
        stamp text not null,
        client text not null,
        title text not null,
        parent_chat_id text,
        branch_from_message_id text,
        created_at timestamptz not null default now(),
        primary key (user_id, chat_id, stamp, client)
    )
    """,
    """
    create view sync_status with (security_invoker = true) as
    select h.user_id, c.key as device_id, to_timestamp((c.value ->> 'at')::bigint / 1000.0) as last_sync_timestamp
    from sync_head h, json_each(h.clients::json) c
    """,
]


def secured(table: str, users: str) -> list[str]:
    return [
        f"alter table {table} enable row level security",
        f"create policy others on {table} using ({OTHERS})",
        f"create policy users on {table} using ({users})",
    ]


def upgrade() -> None:
    statements = [*COLUMNS, *TABLES]
    for table in ("sync_head", "chat_versions"):
        statements += secured(table, f"user_id = {ME}")
    # A push keeps the index of conversations, too. How many there are in all is in no row of a user.
    statements += secured("conversation_counts", "source = 'parley'")
    for statement in statements:
        op.execute(statement)


def downgrade() -> None:
    raise NotImplementedError("Parley's migrations only go forward; restore a backup to go back.")
