"""Our own conversations counted anew from their messages and the ledger, while messages go on being saved.

A row is locked first and counted in a later statement: whoever saved a message before has committed by then and is
counted, and whoever saves one now waits for the row and adds to what was counted. Days are a record that only grows, of
what happened when; they are not counted anew, as messages may be gone that were said on them.
"""

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field

from app.conversations import news, words
from app.conversations.index import OWN
from app.postgres import CONFLICT, Connection

# A chat of ours, as its user and its id.
Key = tuple[str, str]

# What the ledger says of a run is added to the index when the run ends, so what has not ended does not count.
COUNTED = """
select k.username, k.conversation_id, m.messages, m.first_at, m.last_at, m.first_rank, m.last_rank,
    coalesce(first.content, '') as first_question, coalesce(last.content, '') as last_question, l.tokens,
    coalesce(s.chatbot_id, r.chatbot_id, '') as chatbot_id, coalesce(r.model, '') as model
from unnest($1::text[], $2::text[]) as k(username, conversation_id)
cross join lateral (
    select count(*)::int as messages, min(created_at) as first_at, max(created_at) as last_at,
        min(position) filter (where role = 'user') as first_rank,
        max(position) filter (where role = 'user') as last_rank
    from messages where user_id = k.username and chat_id = k.conversation_id and not is_deleted and status <> 'failed'
        and not exists (select from chats where user_id = k.username and id = k.conversation_id and is_deleted)) m
cross join lateral (
    select coalesce(sum(prompt_tokens + completion_tokens), 0)::bigint as tokens
    from usage_ledger where user_id = k.username and chat_id = k.conversation_id
        and stream_id not in (select id from streaming_sessions where status in ('queued', 'active'))) l
left join lateral (
    select left(content, 300) as content from messages where user_id = k.username and chat_id = k.conversation_id
        and position = m.first_rank and role = 'user' and not is_deleted and status <> 'failed' limit 1) first on true
left join lateral (
    select left(content, 300) as content from messages where user_id = k.username and chat_id = k.conversation_id
        and position = m.last_rank and role = 'user' and not is_deleted and status <> 'failed' limit 1) last on true
left join conversation_sessions s on s.user_id = k.username and s.id = k.conversation_id
left join lateral (
    select chatbot_id, model from usage_ledger where user_id = k.username and chat_id = k.conversation_id
    order by started_at desc limit 1) r on true
"""
_MAKE = f"""
insert into conversations (source, username, conversation_id, first_message_at, last_message_at, time_source,
    message_count, total_tokens)
select '{OWN}', k.username, k.conversation_id, now(), now(), 'message', 0, 0
from unnest($1::text[], $2::text[]) as k(username, conversation_id)
where exists (select from messages m join chats c on c.user_id = m.user_id and c.id = m.chat_id
    where m.user_id = k.username and m.chat_id = k.conversation_id and not m.is_deleted and m.status <> 'failed'
        and not c.is_deleted)
order by 2, 3 on conflict do nothing
"""
_LOCK = f"""
select from unnest($1::text[], $2::text[]) as k(username, conversation_id)
join conversations c on (c.source, c.username, c.conversation_id) = ('{OWN}', k.username, k.conversation_id)
order by c.username, c.conversation_id for update of c
"""
_WRITTEN = ", ".join(f"c.{column}" for column in words.WRITTEN.split(", "))
# Chatbot and model of a row that has them are what its last message said.
_OTHERWISE = """
(c.message_count, c.total_tokens, c.first_message_at, c.last_message_at, c.first_question, c.first_question_rank,
    c.last_question, c.last_question_rank, c.chatbot_id = '', c.model = '')
is distinct from (k.messages, k.tokens, k.first_at, k.last_at, k.first_question, k.first_rank,
    k.last_question, k.last_rank, k.chatbot_id = '' and c.chatbot_id = '', k.model = '' and c.model = '')
"""
_WORDLESS = "not exists (select from conversation_words w where w.conversation = c.id and w.said_at = k.last_at)"
_WRITE = f"""
with counted as ({COUNTED}),
gone as (
    delete from conversations c using counted k
    where (c.source, c.username, c.conversation_id) = ('{OWN}', k.username, k.conversation_id) and k.messages = 0
    returning c.id),
forgotten as (delete from conversation_words w using gone where w.conversation = gone.id),
written as (
    update conversations c set
        message_count = k.messages, total_tokens = k.tokens, first_message_at = k.first_at, last_message_at = k.last_at,
        first_question = k.first_question, first_question_rank = k.first_rank,
        last_question = k.last_question, last_question_rank = k.last_rank,
        chatbot_id = coalesce(nullif(c.chatbot_id, ''), k.chatbot_id), model = coalesce(nullif(c.model, ''), k.model),
        updated_at = now()
    from counted k
    where (c.source, c.username, c.conversation_id) = ('{OWN}', k.username, k.conversation_id) and k.messages > 0
        and ({_OTHERWISE} or {_WORDLESS})
    returning {_WRITTEN}),
words as ({words.saved("written")})
select coalesce((select sum(messages) from counted), 0)::bigint as messages,
    (select count(*) from written) as written, (select count(*) from gone) as gone
"""
# All of one snapshot, and every message is saved together with what the index says of it. Words are written when a run
# ends, so that a conversation has none while its first one is under way.
_DIFFERING = f"""
select k.username, k.conversation_id from ({COUNTED}) k
left join conversations c on (c.source, c.username, c.conversation_id) = ('{OWN}', k.username, k.conversation_id)
where (c.id is null) <> (k.messages = 0) or (c.id is not null and ({_OTHERWISE} or ({_WORDLESS}
    and not exists (select from streaming_sessions s where s.user_id = k.username and s.session_id = k.conversation_id
        and s.status in ('queued', 'active')))))
order by 1, 2
"""
_ADD = """
insert into conversation_counts as n (source, slot, conversations) values ($1, 0, $2)
on conflict (source, slot) do update set conversations = n.conversations + excluded.conversations
"""
_CHATS = "select user_id, id from chats where (user_id, id) > ($1, $2) order by user_id, id limit $3"
_FIRST_CHATS = "select user_id, id from chats order by user_id, id limit $1"
# Those whose chats are gone. The walk is over the index's rows, so that it is bounded by them.
_ORPHANS = f"""
with page as (
    select username, conversation_id from conversations
    where source = '{OWN}' and (username, conversation_id) > ($1, $2) order by username, conversation_id limit $3)
select username, conversation_id, exists (
    select from chats c where c.user_id = page.username and c.id = page.conversation_id) as is_there
from page order by 1, 2
"""
_HOW_MANY = "select count(*) from chats"

# Chats of a batch: whoever saves a message in one of them waits for so many counts.
_BATCH = 200
# Orphans are looked for among so many rows at once.
_PAGE = 2_000
# Those named that could not be counted.
MOST_FAILED = 100


@dataclass(frozen=True, slots=True)
class Failed:
    """A conversation that could not be counted."""

    source: str
    id: str
    reason: str


@dataclass(slots=True)
class Recounted:
    """How far a recount is: `of` so many chats. `written` are those of which the index said something else."""

    of: int = 0
    messages: int = 0
    found: int = 0
    written: int = 0
    failed: list[Failed] = field(default_factory=list)
    failures: int = 0

    def fail(self, key: Key, reason: str) -> None:
        self.failures += 1
        if len(self.failed) < MOST_FAILED:
            self.failed.append(Failed(OWN, key[1], reason))


# Told after every batch.
Progress = Callable[[Recounted], None]


async def recount(connection: Connection, progress: Progress = lambda _: None, *, batch: int = _BATCH) -> Recounted:
    """Count all our conversations anew, and take out those without a message. To be called by one at a time."""
    done = Recounted(of=await connection.fetchval(_HOW_MANY))
    async for keys in chats(connection, batch):
        await count_most(connection, keys, done)
        done.found += len(keys)
        progress(done)
    async for keys in _orphans(connection):
        await count_most(connection, keys, done)
    return done


async def chats(connection: Connection, batch: int) -> AsyncGenerator[list[Key], None]:
    """All chats in the order of their keys, so many at once."""
    keys = await chats_after(connection, None, batch)
    while keys:
        yield keys
        keys = await chats_after(connection, keys[-1], batch)


async def chats_after(connection: Connection, after: Key | None, batch: int) -> list[Key]:
    """So many chats behind one, or the first ones."""
    if after is None:
        rows = await connection.fetch(_FIRST_CHATS, batch)
    else:
        rows = await connection.fetch(_CHATS, *after, batch)
    return [(row[0], row[1]) for row in rows]


async def _orphans(connection: Connection) -> AsyncGenerator[list[Key], None]:
    after: Key | None = ("", "")
    while after is not None:
        gone, after = await orphans_after(connection, after)
        if gone:
            yield gone


async def orphans_after(connection: Connection, after: Key) -> tuple[list[Key], Key | None]:
    """Conversations of a page of the index of which there is no chat, and where the page ends; None at the end."""
    rows = await connection.fetch(_ORPHANS, *after, _PAGE)
    return [(row[0], row[1]) for row in rows if not row[2]], (rows[-1][0], rows[-1][1]) if rows else None


async def differing(connection: Connection, keys: Sequence[Key]) -> list[Key]:
    """Those of which the index says something else than their messages and the ledger, as one snapshot shows both."""
    rows = await connection.fetch(_DIFFERING, [key[0] for key in keys], [key[1] for key in keys])
    return [(row[0], row[1]) for row in rows]


async def count_most(connection: Connection, keys: Sequence[Key], done: Recounted) -> None:
    """Count these. Of those that somebody keeps locked, the others are counted all the same."""
    try:
        messages, written = await count(connection, keys)
    except CONFLICT as error:
        if len(keys) == 1:
            done.fail(keys[0], f"somebody else holds it ({type(error).__name__})")
            return
        half = len(keys) // 2
        await count_most(connection, keys[:half], done)
        await count_most(connection, keys[half:], done)
    else:
        done.messages += messages
        done.written += written


async def count(connection: Connection, keys: Sequence[Key]) -> tuple[int, int]:
    """Count these in one transaction; returns their messages, and how many rows said something else."""
    async with connection.transaction():
        return await count_within(connection, keys)


async def count_within(connection: Connection, keys: Sequence[Key]) -> tuple[int, int]:
    """As `count`, in the caller's transaction."""
    columns = [key[0] for key in keys], [key[1] for key in keys]
    made = int((await connection.execute(_MAKE, *columns)).rpartition(" ")[2])
    await connection.execute(_LOCK, *columns)
    row = await connection.fetchrow(_WRITE, *columns)
    assert row is not None
    news.changed()
    if made != row["gone"]:
        await connection.execute(_ADD, OWN, made - row["gone"])
    return row["messages"], row["written"] + row["gone"]
