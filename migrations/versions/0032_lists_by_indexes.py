"""What lists of conversations ask of many rows stands in indexes: the ids of a chat's messages, and further filters."""

from alembic import op

revision = "0032"
down_revision = "0031"

# Nobody builds the index anew meanwhile, from what these change: the lock of app/conversations/upkeep.py.
ALONE = "select pg_advisory_xact_lock(x'7061726c65790004'::bigint)"
# What one that was killed has left has indexes of these names.
LEFT = [
    "drop function if exists conversation_changed() cascade",
    "drop table if exists conversation_changes, conversations_next",
]
# A page of 50 conversations names up to a hundred messages of each, which lie all over their table; of a chatbot's
# conversations those of another model are passed over. Readers wait only while names change; who saves a message waits
# until these are made, some two seconds for a million messages.
INDEXES = {
    "messages_in_chat": "messages (chat_id, user_id, position) include (id, is_deleted)",
    "conversations_of_chatbot": "conversations (chatbot_id, last_message_at desc, id desc) include (model, source)",
    "conversations_of_model": "conversations (model, last_message_at desc, id desc) include (source)",
}
# An index answers alone for what VACUUM has seen. It would come by when a table that only grows is a fifth larger.
SEEN = "alter table messages set (autovacuum_vacuum_insert_scale_factor = 0.05)"


def upgrade() -> None:
    for statement in [ALONE, *LEFT]:
        op.execute(statement)
    for name, definition in INDEXES.items():
        op.execute(f"create index {name}_next on {definition}")
    for name in INDEXES:
        op.execute(f"drop index {name}")
        op.execute(f"alter index {name}_next rename to {name}")
    op.execute(SEEN)


def downgrade() -> None:
    raise NotImplementedError("Parley's migrations only go forward; restore a backup to go back.")
