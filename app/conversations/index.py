"""The tables of the index as they are written: by our own chats, in the transaction that saves a message or ends its
run, and by a pass over another source."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import orjson

from app.conversations import news, words
from app.conversations.summary import KEYS, QUESTION, Ranked, Summary
from app.postgres import Connection, Pool
from app.statement import Part, fetch_together

OWN = "parley"
# Rows among which the conversations of a source are counted, so that new ones do not wait for each other.
_SLOTS = 16
# Counting all conversations of a source, in seconds.
_LONG_S = 60

# Our own positions: never two questions at one.
_QUESTIONS = """
        first_question = case when c.first_question_rank <= excluded.first_question_rank
            or excluded.first_question_rank is null then c.first_question else excluded.first_question end,
        first_question_rank = least(c.first_question_rank, excluded.first_question_rank),
        last_question = case when c.last_question_rank > excluded.last_question_rank
            or excluded.last_question_rank is null then c.last_question else excluded.last_question end,
        last_question_rank = greatest(c.last_question_rank, excluded.last_question_rank)
"""
# `{said}` has the position of what was said, null for an answer.
_SAID = f"""
conversation as (
    insert into conversations as c (
        source, username, conversation_id, chatbot_id, model, client_ip, first_message_at, last_message_at,
        time_source, message_count, total_tokens, first_question, first_question_rank, last_question,
        last_question_rank)
    select '{OWN}', $1, $2, $3, $4, $5, now(), now(), 'message', $8, 0, $6, said.position, $6, said.position
    from {{said}} said
    on conflict (source, username, conversation_id) do update set
        chatbot_id = excluded.chatbot_id,
        model = case when excluded.model = '' then c.model else excluded.model end,
        client_ip = case when excluded.client_ip = '' then c.client_ip else excluded.client_ip end,
        first_message_at = case when excluded.message_count = 0 then c.first_message_at
            else least(c.first_message_at, excluded.first_message_at) end,
        last_message_at = case when excluded.message_count = 0 then c.last_message_at
            else greatest(c.last_message_at, excluded.last_message_at) end,
        message_count = c.message_count + excluded.message_count,
        {_QUESTIONS},
        updated_at = now()
    returning xmax = 0 as is_new),
counted as (
    insert into conversation_counts as n (source, slot, conversations)
    select '{OWN}', $7, 1 from conversation where is_new
    on conflict (source, slot) do update set conversations = n.conversations + 1)
"""
_ASKED = _SAID.format(said="message")
_SAID_AT = _SAID.format(said="(select $9::bigint as position)")
# A device brought a question that is now asked: its run counts it.
_ASKED_NOW = f"""
update conversation_days set messages = messages - 1, questions = questions - 1
where day = ($2::timestamptz at time zone 'utc')::date and source = '{OWN}' and username = $1
    and chatbot_id = '' and model = ''
"""
# Words only now: once for a question and its answer, and not while somebody waits for the message to be accepted.
_ENDED = f"""
with conversation as (
    update conversations set total_tokens = total_tokens + $4, updated_at = now()
    where source = '{OWN}' and username = $1 and conversation_id = $2
    returning {words.WRITTEN}),
words as ({words.saved("conversation")})
insert into conversation_days as d (day, source, username, chatbot_id, model, messages, questions, tokens, duration_ms)
select (now() at time zone 'utc')::date, '{OWN}', $1, $3, share.*
from unnest($5::text[], $6::int[], $7::int[], $8::bigint[], $9::bigint[])
    as share(model, messages, questions, tokens, duration_ms) order by share.model
on conflict (day, source, username, chatbot_id, model) do update set
    messages = d.messages + excluded.messages, questions = d.questions + excluded.questions,
    tokens = d.tokens + excluded.tokens, duration_ms = d.duration_ms + excluded.duration_ms
"""
# The greater of two ranked values, of equal ranks the greater text: as `Summary` decides, in code points.
_GREATER = """
case when excluded.{name}_rank is not null and (c.{name}_rank is null
    or (excluded.{name}_rank, excluded.{name} collate "C") > (c.{name}_rank, c.{name} collate "C"))
    then excluded.{name} else c.{name} end
"""


def _greater(name: str) -> str:
    return _GREATER.format(name=name)


def bringing(lines: str) -> str:
    """SQL: the end, behind its WITH, of a statement that writes messages which a device of the user $1 has brought.

    `lines` is the parameter with what `brought` made of them. They count as said now; nobody knows a chatbot, model or
    client of theirs. It does what `_MERGE` would, in chats in the order of their key.
    """
    return f"""
given as (
    select * from json_to_recordset({lines}::json)
        as g(chat text, messages int, questions int, first text, first_rank bigint, last text, last_rank bigint)),
conversation as (
    insert into conversations as c (
        source, username, conversation_id, first_message_at, last_message_at, time_source, message_count, total_tokens,
        first_question, first_question_rank, last_question, last_question_rank)
    select '{OWN}', $1, chat, now(), now(), 'message', messages, 0, first, first_rank, last, last_rank
    from given order by chat
    on conflict (source, username, conversation_id) do update set
        first_message_at = least(c.first_message_at, excluded.first_message_at),
        last_message_at = greatest(c.last_message_at, excluded.last_message_at),
        message_count = c.message_count + excluded.message_count,
        {_QUESTIONS},
        updated_at = now()
    returning xmax = 0 as is_new, conversation_id, {words.WRITTEN}),
worded as (
    select {words.WRITTEN} from conversation join given on chat = conversation_id
    where is_new or first_rank is not null),
words as ({words.saved("worded")}),
said as (
    update conversation_words w set said_at = c.last_message_at
    from conversation c join given on given.chat = c.conversation_id
    where w.conversation = c.id and not c.is_new and first_rank is null),
counted as (
    insert into conversation_counts as n (source, slot, conversations)
    select '{OWN}', floor(random() * {_SLOTS}), count(*) from conversation where is_new having count(*) > 0
    on conflict (source, slot) do update set conversations = n.conversations + excluded.conversations)
insert into conversation_days as d (day, source, username, chatbot_id, model, messages, questions, tokens, duration_ms)
select (now() at time zone 'utc')::date, '{OWN}', $1, '', '', sum(messages), sum(questions), 0, 0 from given
on conflict (day, source, username, chatbot_id, model) do update set
    messages = d.messages + excluded.messages, questions = d.questions + excluded.questions
"""


# The newest of two lists of keys, bounded.
_NEWEST = f"""
case when cardinality(excluded.message_ids) = 0 then c.{{column}} else (
    select array_agg({{value}} order by rank, id collate "C") from (
        select id, rank from unnest(c.message_ids || excluded.message_ids, c.message_ranks || excluded.message_ranks)
            as kept(id, rank)
        order by rank desc, id collate "C" desc limit {KEYS}) newest) end
"""
# Rows in the order of their key, so that two that write the same ones wait for each other and do not lock up.
_SUMMARIES = """
    insert into conversations as c (
        source, username, conversation_id, chatbot_id, chatbot_id_rank, model, model_rank, client_ip, client_ip_rank,
        first_message_at, last_message_at, time_source, message_count, total_tokens,
        first_question, first_question_rank, last_question, last_question_rank, message_ids, message_ranks)
    select $1, m.username, m.conversation_id, m.chatbot_id, m.chatbot_id_rank, m.model, m.model_rank,
        m.client_ip, m.client_ip_rank, coalesce(m.first_at, parley_now()), coalesce(m.last_at, parley_now()),
        case when m.first_at is null then 'discovery' else 'message' end, m.messages, m.tokens,
        m.first_question, m.first_rank, m.last_question, m.last_rank,
        array(select jsonb_array_elements_text(m.keys::jsonb)),
        array(select jsonb_array_elements_text(m.ranks::jsonb)::bigint)
    from unnest(
        $2::text[], $3::text[], $4::text[], $5::bigint[], $6::text[], $7::bigint[], $8::text[], $9::bigint[],
        $10::timestamptz[], $11::timestamptz[], $12::bigint[], $13::bigint[],
        $14::text[], $15::bigint[], $16::text[], $17::bigint[], $18::text[], $19::text[])
        as m(username, conversation_id, chatbot_id, chatbot_id_rank, model, model_rank, client_ip, client_ip_rank,
            first_at, last_at, messages, tokens, first_question, first_rank, last_question, last_rank, keys, ranks)
    order by m.username, m.conversation_id
    on conflict (source, username, conversation_id) do update set
"""
_MERGE = f"""
with merged as ({_SUMMARIES}
        chatbot_id = {_greater("chatbot_id")},
        chatbot_id_rank = greatest(c.chatbot_id_rank, excluded.chatbot_id_rank),
        model = {_greater("model")},
        model_rank = greatest(c.model_rank, excluded.model_rank),
        client_ip = {_greater("client_ip")},
        client_ip_rank = greatest(c.client_ip_rank, excluded.client_ip_rank),
        first_message_at = least(c.first_message_at, excluded.first_message_at),
        last_message_at = greatest(c.last_message_at, excluded.last_message_at),
        message_count = c.message_count + excluded.message_count,
        total_tokens = c.total_tokens + excluded.total_tokens,
        first_question = case when c.first_question_rank is null
            or (excluded.first_question_rank, excluded.first_question collate "C")
                < (c.first_question_rank, c.first_question collate "C")
            then excluded.first_question else c.first_question end,
        first_question_rank = least(c.first_question_rank, excluded.first_question_rank),
        last_question = {_greater("last_question")},
        last_question_rank = greatest(c.last_question_rank, excluded.last_question_rank),
        message_ids = {_NEWEST.format(column="message_ids", value="id")},
        message_ranks = {_NEWEST.format(column="message_ranks", value="rank")},
        updated_at = now()
    returning xmax = 0 as is_new, {words.WRITTEN}),
words as ({words.saved("merged")})
select count(*) filter (where is_new) from merged
"""
# What rows say whose times are not known leaves times as they are.
_REPLACE = f"""
with replaced as ({_SUMMARIES}
        chatbot_id = excluded.chatbot_id, chatbot_id_rank = excluded.chatbot_id_rank,
        model = excluded.model, model_rank = excluded.model_rank,
        client_ip = excluded.client_ip, client_ip_rank = excluded.client_ip_rank,
        first_message_at = case when excluded.time_source = 'discovery' then c.first_message_at
            else excluded.first_message_at end,
        last_message_at = case when excluded.time_source = 'discovery' then c.last_message_at
            else excluded.last_message_at end,
        message_count = excluded.message_count, total_tokens = excluded.total_tokens,
        first_question = excluded.first_question, first_question_rank = excluded.first_question_rank,
        last_question = excluded.last_question, last_question_rank = excluded.last_question_rank,
        message_ids = excluded.message_ids, message_ranks = excluded.message_ranks, updated_at = now()
    returning xmax = 0 as is_new, {words.WRITTEN}),
words as ({words.saved("replaced")})
select count(*) filter (where is_new) from replaced
"""
_DROP = """
with gone as (
    delete from conversations c using unnest($2::text[], $3::text[]) as k(username, conversation_id)
    where (c.source, c.username, c.conversation_id) = ($1, k.username, k.conversation_id) returning c.id),
words as (delete from conversation_words w using gone where w.conversation = gone.id)
select count(*) from gone
"""
_COUNTED = """
insert into conversation_counts as n (source, slot, conversations) values ($1, $2, $3)
on conflict (source, slot) do update set conversations = n.conversations + excluded.conversations
"""
# As one snapshot shows both; added as a difference, so that it does not matter who counts meanwhile.
_TOTAL = """
insert into conversation_counts as n (source, slot, conversations)
select $1, 0, wrong.by from (
    select (select count(*) from conversations where source = $1)
        - (select coalesce(sum(conversations), 0)::bigint from conversation_counts where source = $1) as by) wrong
where wrong.by <> 0
on conflict (source, slot) do update set conversations = n.conversations + excluded.conversations
"""
# Of messages without a time: the day they were found.
_DAYS = """
insert into conversation_days as d (day, source, username, chatbot_id, model, messages, questions, tokens, duration_ms)
select coalesce(f.day, (parley_now() at time zone 'utc')::date) as day, $1, f.username, f.chatbot_id, f.model,
    sum(f.messages), sum(f.questions), sum(f.tokens), sum(f.duration_ms)
from unnest($2::date[], $3::text[], $4::text[], $5::text[], $6::bigint[], $7::bigint[], $8::bigint[], $9::bigint[])
    as f(day, chatbot_id, model, username, messages, questions, tokens, duration_ms)
group by 1, 3, 4, 5 order by 1, 3, 4, 5
on conflict (day, source, username, chatbot_id, model) do update set
    messages = d.messages + excluded.messages, questions = d.questions + excluded.questions,
    tokens = d.tokens + excluded.tokens, duration_ms = d.duration_ms + excluded.duration_ms
"""


@dataclass(frozen=True, slots=True)
class Chat:
    """Which chat of ours, with which chatbot."""

    user_id: str
    id: str
    chatbot_id: str


@dataclass(slots=True)
class Share:
    """What a model has done in one run, all its attempts together, and what was said there."""

    messages: int = 0
    questions: int = 0
    tokens: int = 0
    duration_ms: int = 0


def asked(chat: Chat, question: str, *, client_ip: str = "") -> Part:
    """A user's message is saved, by the query `message` of the same statement (app/chats/store.py)."""
    return Part(_ASKED, _values(chat, "", client_ip, question, messages=1))


async def asked_known(
    connection: Connection, chat: Chat, question: str, *, position: int, at: datetime, client_ip: str = ""
) -> None:
    """A message is asked that a device had brought at that time: it is counted already, and its chatbot known now."""
    await _said(connection, _values(chat, "", client_ip, question, messages=0), position)
    await connection.execute(_ASKED_NOW, chat.user_id, at)


async def answered(connection: Connection, chat: Chat, *, model: str) -> None:
    """An answer of this model was saved. To be called once for each, in the transaction that saved it."""
    await _said(connection, _values(chat, model, "", "", messages=1), None)


async def _said(connection: Connection, values: tuple[Any, ...], position: int | None) -> None:
    await fetch_together(connection, [Part(_SAID_AT, (*values, position))], "select")


def _values(chat: Chat, model: str, client_ip: str, question: str, *, messages: int) -> tuple[Any, ...]:
    news.saved()
    slot = random.randrange(_SLOTS)
    return (chat.user_id, chat.id, chat.chatbot_id, model, client_ip, question[:QUESTION], slot, messages)


async def ended(connection: Connection, chat: Chat, shares: Mapping[str, Share]) -> None:
    """A run in this chat has ended, with shares by model; once for each, in the transaction that ends it."""
    parts = list(shares.values())
    news.saved()
    await connection.execute(
        _ENDED,
        *(chat.user_id, chat.id, chat.chatbot_id, sum(share.tokens for share in parts)),
        list(shares),
        *([getattr(share, name) for share in parts] for name in Share.__slots__),
    )


def brought(summaries: Mapping[tuple[str, str], Summary]) -> str:
    """What `bringing` asks for, of one user's messages; each once, in the transaction that saves them."""
    news.saved()
    return orjson.dumps([_line(chat, summary) for (_, chat), summary in summaries.items()]).decode()


def _line(chat: str, of: Summary) -> dict[str, Any]:
    (first, first_rank), (last, last_rank) = _ranked(of.first_question), _ranked(of.last_question)
    questions = sum(figures.questions for figures in of.days.values())
    counts = {"chat": chat, "messages": of.messages, "questions": questions}
    return {**counts, "first": first, "first_rank": first_rank, "last": last, "last_rank": last_rank}


async def merge(connection: Connection, source: str, summaries: Mapping[tuple[str, str], Summary]) -> int:
    """Add what rows of a source add up to; returns how many conversations are new.

    Each row once: to be called in the transaction that writes down that these rows were counted.
    """
    if not summaries:
        return 0
    rows = [_row(*name, summary) for name, summary in sorted(summaries.items())]
    news.changed()
    created: int = await connection.fetchval(_MERGE, source, *map(list, zip(*rows, strict=True)))
    if created:
        await connection.execute(_COUNTED, source, random.randrange(_SLOTS), created)
    days = [
        (*day, username, of.messages, of.questions, of.tokens, of.duration_ms)
        for (username, _), summary in summaries.items()
        for day, of in summary.days.items()
    ]
    await connection.execute(_DAYS, source, *map(list, zip(*days, strict=True)))
    return created


async def replace(
    connection: Connection, source: str, summaries: Mapping[tuple[str, str], Summary], gone: Sequence[tuple[str, str]]
) -> None:
    """Have the index say of these conversations what all rows of theirs add up to that were counted, and nothing of
    those that are gone. Days stay: they are a record of what was said when.

    To be called in the transaction that holds the source's state as it was when the rows were read.
    """
    change = 0
    if summaries:
        rows = [_row(*name, summary) for name, summary in sorted(summaries.items())]
        change += await connection.fetchval(_REPLACE, source, *map(list, zip(*rows, strict=True)))
    if gone:
        change -= await connection.fetchval(_DROP, source, [name[0] for name in gone], [name[1] for name in gone])
    if change:
        await connection.execute(_COUNTED, source, random.randrange(_SLOTS), change)


async def put_total_right(connection: Connection | Pool, source: str) -> bool:
    """Have the total of a source be the number of its conversations; whether it was another one. Reads all of them."""
    return (await connection.execute(_TOTAL, source, timeout=_LONG_S)) != "INSERT 0 0"


def _row(username: str, conversation_id: str, of: Summary) -> tuple[Any, ...]:
    return (
        *(username, conversation_id),
        *(*_ranked(of.chatbot_id), *_ranked(of.model), *_ranked(of.client_ip)),
        *(of.first_at, of.last_at, of.messages, of.tokens),
        *(*_ranked(of.first_question), *_ranked(of.last_question)),
        orjson.dumps([key for _, key in of.keys]).decode(),
        orjson.dumps([rank for rank, _ in of.keys]).decode(),
    )


def _ranked(value: Ranked | None) -> tuple[str, int | None]:
    return ("", None) if value is None else (value[1], value[0])
