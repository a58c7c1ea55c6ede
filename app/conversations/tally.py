"""All of our own conversations counted at once: each table read from its beginning to its end, not once per chat.

It says what `recount.COUNTED` says of chats by their keys. Messages are read twice, as only then is it known which
questions were the first and the last of a chat. What is put aside between the two is a table that nobody else sees.
"""

from app.postgres import Connection

_SAID = """
create unlogged table {said} as
select user_id, chat_id, count(*)::int as messages, min(created_at) as first_at, max(created_at) as last_at,
    min(position) filter (where role = 'user') as first_rank, max(position) filter (where role = 'user') as last_rank
from messages where not is_deleted and status <> 'failed' group by user_id, chat_id
"""
# Whoever pushes messages may have given two of them one place.
_ASKED = """
create unlogged table {asked} as
select user_id, chat_id, min(left(content, 300)) filter (where position = first_rank) as first_question,
    min(left(content, 300)) filter (where position = last_rank) as last_question
from messages join {said} using (user_id, chat_id)
where role = 'user' and not is_deleted and status <> 'failed' and (position = first_rank or position = last_rank)
group by user_id, chat_id
"""
_COUNTED = """
select m.user_id as username, m.chat_id as conversation_id, m.messages, m.first_at, m.last_at, m.first_rank,
    m.last_rank, coalesce(a.first_question, '') as first_question, coalesce(a.last_question, '') as last_question,
    coalesce(l.tokens, 0) as tokens, coalesce(s.chatbot_id, r.chatbot_id, '') as chatbot_id,
    coalesce(r.model, '') as model
from {said} m
join chats k on (k.user_id, k.id) = (m.user_id, m.chat_id) and not k.is_deleted
left join {asked} a on (a.user_id, a.chat_id) = (m.user_id, m.chat_id)
left join (
    select user_id, chat_id, sum(prompt_tokens + completion_tokens)::bigint as tokens from usage_ledger
    where stream_id not in (select id from streaming_sessions where status in ('queued', 'active'))
    group by user_id, chat_id) l on (l.user_id, l.chat_id) = (m.user_id, m.chat_id)
left join (
    select distinct on (user_id, chat_id) user_id, chat_id, chatbot_id, model from usage_ledger
    order by user_id, chat_id, started_at desc) r on (r.user_id, r.chat_id) = (m.user_id, m.chat_id)
left join conversation_sessions s on (s.user_id, s.id) = (m.user_id, m.chat_id)
"""
# Of several tables of a million rows each the planner expects a thousand rows, for which it would look one by one. One
# process at a time is enough beside those that want the lists meanwhile. Of so much memory a join may take twice, and
# what does not fit is put on the disk.
_SETTINGS = [
    "set local enable_nestloop = off",
    "set local enable_mergejoin = off",
    "set local max_parallel_workers_per_gather = 0",
    "set local jit = off",
    "set local work_mem = '32MB'",
]


class Tally:
    """For the length of a transaction, which sees everything as it was at its beginning."""

    def __init__(self, schema: str) -> None:
        self._tables = {"said": f"{schema}.conversations_said", "asked": f"{schema}.conversations_asked"}
        self.counted = _COUNTED.format(**self._tables)

    async def read(self, connection: Connection, *, within_s: float) -> None:
        """Read all messages; afterwards `counted` can be asked, and joins are planned for all of it."""
        for setting in _SETTINGS:
            await connection.execute(setting)
        for name, statement in (("said", _SAID), ("asked", _ASKED)):
            await connection.execute(statement.format(**self._tables), timeout=within_s)
            await connection.execute(f"analyze {self._tables[name]}", timeout=within_s)

    async def forget(self, connection: Connection) -> None:
        for table in self._tables.values():
            await connection.execute(f"drop table {table}")
