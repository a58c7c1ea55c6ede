"""What the index says of our own chats beside what a count over their messages and the ledger says."""

from typing import Any

import asyncpg

from app.conversations import words

_COUNTED = """
select c.conversation_id, c.message_count as count, m.count as of_messages, c.first_question, m.first,
       c.last_question, m.last, c.total_tokens, l.tokens, c.chatbot_id, c.first_message_at, m.since,
       c.last_message_at, m.until
from conversations c
join lateral (
    select count(*) as count, min(created_at) as since, max(created_at) as until,
        coalesce((array_agg(left(content, 300) order by position) filter (where role = 'user'))[1], '') as first,
        coalesce((array_agg(left(content, 300) order by position desc) filter (where role = 'user'))[1], '') as last
    from messages where user_id = c.username and chat_id = c.conversation_id
        and not is_deleted and status <> 'failed') m on true
join lateral (
    select coalesce(sum(prompt_tokens + completion_tokens), 0) as tokens from usage_ledger
    where user_id = c.username and chat_id = c.conversation_id) l on true
order by c.conversation_id
"""
# Conversations whose words are others than what would be written of them, or that have none; and words of none.
_WORDS = f"""
select c.id, w.conversation from (select id, last_message_at, {words.vector()} as words from conversations) c
full join conversation_words w on w.conversation = c.id
where (w.said_at, w.words) is distinct from (c.last_message_at, c.words)
"""
_CHATS = """
select count(*) from chats c where not is_deleted and exists (select from messages m
    where m.user_id = c.user_id and m.chat_id = c.id and not m.is_deleted and m.status <> 'failed')
"""
# Days count what was said, also where it was deleted since.
_DELETED = """
select exists (select from chats where is_deleted) or exists (select from messages where is_deleted)
"""


async def agreed(database: asyncpg.Connection) -> list[dict[str, Any]]:
    """Every conversation, each of which says what its messages and the ledger say."""
    rows = [dict(row) for row in await database.fetch(_COUNTED)]
    for row in rows:
        assert row["count"] == row["of_messages"]
        assert (row["first_question"], row["last_question"]) == (row["first"], row["last"])
        assert (row["first_message_at"], row["last_message_at"]) == (row["since"], row["until"])
        assert row["total_tokens"] == row["tokens"]
    assert len(rows) == await database.fetchval(_CHATS)
    assert len(rows) == await database.fetchval("select coalesce(sum(conversations), 0) from conversation_counts")
    assert await database.fetch(_WORDS) == []
    days = await database.fetchrow("select sum(messages) as messages, sum(tokens) as tokens from conversation_days")
    assert days is not None
    if rows and not await database.fetchval(_DELETED):
        assert days["messages"] == sum(row["count"] for row in rows)
        assert days["tokens"] == sum(row["tokens"] for row in rows)
    return rows
