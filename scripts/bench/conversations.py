"""Conversations of ten messages, made by the server itself, with words as rare and as common as in life."""

from app.conversations import words
from app.postgres import Connection

MESSAGES = 10
# A hundredth of the users as large as all others; two chatbots with half of everything; models of their own for the odd
# chatbots, so that some filters are met together by nobody.
_CONVERSATIONS = """
insert into conversations (id, source, username, conversation_id, chatbot_id, model, client_ip, first_message_at,
    last_message_at, time_source, message_count, total_tokens, first_question, first_question_rank, last_question,
    last_question_rank)
select n, source, 'user-' || person, 'chat-' || n, 'bot-' || bot, 'model-' || 2 * kind + bot % 2, '203.0.113.7',
    said - ({messages} - 1) * interval '30 s', said, 'message', {messages}, 900, {words}, 0, {words}, {messages} - 2
from (
    select n, (array['parley', 'parley', 'parley', 'parley', 'parley', 'parley', 'parley', 'n8n', 'flowise', 'litellm'])
            [1 + n % 10] as source,
        case when n % 2 = 0 then n % 97 else n % 20011 end as person,
        case when n % 4 < 2 then n % 4 else n % 41 end as bot, n / 7 % 3 as kind,
        now() - ({conversations} - n) * interval '20 s' as said
    from generate_series({first}::bigint, {last}) n) made
"""
# The rank of a word is log-uniform: the n-th word is 1/n as frequent as the first. 12 words; n makes each row's anew.
_WORDS = """
(select string_agg('w' || floor(exp(random() * 10.8)), ' ') from generate_series(1, 12) k where n > 0)
"""
_MESSAGES = """
insert into messages (user_id, id, chat_id, content, role, position, created_at)
select c.username, 'm' || c.id || '-' || p, c.conversation_id,
    case p when 0 then c.first_question when {messages} - 2 then c.last_question
        else repeat(md5(c.id || '-' || p), 5) end,
    case when p % 2 = 0 then 'user' else 'assistant' end, p, c.last_message_at - ({messages} - 1 - p) * interval '30 s'
from conversations c, generate_series(0, {messages} - 1) p where c.id between {first} and {last}
"""
# Of our own: a rebuild counts them from their messages. The others' messages stand in the same table, for the queries
# that the index is compared with, and are no chats of ours.
_CHATS = """
insert into chats (user_id, id, created_at)
select username, conversation_id, first_message_at from conversations
where source = 'parley' and id between {first} and {last}
"""
_WRITTEN = "(select * from conversations order by id) written"
_STEP = 100_000


async def fill(connection: Connection, conversations: int, *, messages: bool = True) -> None:
    """Into empty tables."""
    for first in range(1, conversations + 1, _STEP):
        bounds = {"first": first, "last": min(first + _STEP - 1, conversations)}
        for statement in (_CONVERSATIONS, _CHATS, _MESSAGES) if messages else (_CONVERSATIONS,):
            sql = statement.format(messages=MESSAGES, conversations=conversations, words=_WORDS, **bounds)
            await connection.execute(sql, timeout=600)
    for statement in (
        f"select setval(pg_get_serial_sequence('conversations', 'id'), {conversations})",
        "insert into conversation_counts select source, 0, count(*) from conversations group by source",
        "drop index conversation_words_found",
        words.saved(_WRITTEN),
        "create index conversation_words_found on conversation_words using gin (words) with (fastupdate = off)",
    ):
        await connection.execute(statement, timeout=3600)
    await vacuum(connection)


async def restore(connection: Connection, conversations: int) -> None:
    """Take out what an earlier run has added: messages that it saved, and what its passes have found."""
    async with connection.transaction():
        await connection.execute("delete from conversation_words where conversation > $1", conversations)
        await connection.execute("delete from conversations where id > $1", conversations)
        await connection.execute("delete from messages where user_id like 'saver-%'", timeout=1200)
        await connection.execute("delete from conversation_counts")
        await connection.execute(
            "insert into conversation_counts select source, 0, count(*) from conversations group by 1", timeout=600
        )
    await vacuum(connection)


async def vacuum(connection: Connection) -> None:
    """As autovacuum and the checkpointer do, which would come by while something is measured."""
    for table in ("conversations", "conversation_words", "messages", "chats"):
        await connection.execute(f"vacuum analyze {table}", timeout=1200)
    await connection.execute("checkpoint", timeout=1200)
