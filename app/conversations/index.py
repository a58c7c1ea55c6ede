"""The tables of the index as our own chats write them: in the transaction that saves a message or ends its run."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from app.conversations.summary import QUESTION
from app.postgres import Connection

OWN = "parley"
# Rows among which the conversations of a source are counted, so that new ones do not wait for each other.
_SLOTS = 16

_SAID = f"""
with conversation as (
    insert into conversations as c (
        source, username, conversation_id, chatbot_id, model, client_ip, first_message_at, last_message_at,
        time_source, message_count, total_tokens, first_question, first_question_rank, last_question,
        last_question_rank)
    values ('{OWN}', $1, $2, $3, $4, $5, now(), now(), 'message', 1, 0, $6, $7, $6, $7)
    on conflict (source, username, conversation_id) do update set
        chatbot_id = excluded.chatbot_id,
        model = case when excluded.model = '' then c.model else excluded.model end,
        client_ip = case when excluded.client_ip = '' then c.client_ip else excluded.client_ip end,
        last_message_at = greatest(c.last_message_at, excluded.last_message_at),
        message_count = c.message_count + 1,
        first_question = case when c.first_question_rank <= excluded.first_question_rank
            or excluded.first_question_rank is null then c.first_question else excluded.first_question end,
        first_question_rank = least(c.first_question_rank, excluded.first_question_rank),
        last_question = case when c.last_question_rank > excluded.last_question_rank
            or excluded.last_question_rank is null then c.last_question else excluded.last_question end,
        last_question_rank = greatest(c.last_question_rank, excluded.last_question_rank),
        updated_at = now()
    returning xmax = 0 as is_new),
counted as (
    insert into conversation_counts as n (source, slot, conversations)
    select '{OWN}', $8, 1 from conversation where is_new
    on conflict (source, slot) do update set conversations = n.conversations + 1)
insert into conversation_days as d (day, source, username, chatbot_id, model, messages, questions, tokens, duration_ms)
values ((now() at time zone 'utc')::date, '{OWN}', $1, $3, $4, 1, ($7::bigint is not null)::int, 0, 0)
on conflict (day, source, username, chatbot_id, model) do update set
    messages = d.messages + 1, questions = d.questions + excluded.questions
"""
_SPENT = f"""
with conversation as (
    update conversations set total_tokens = total_tokens + $4, updated_at = now()
    where source = '{OWN}' and username = $1 and conversation_id = $2)
insert into conversation_days as d (day, source, username, chatbot_id, model, messages, questions, tokens, duration_ms)
select (now() at time zone 'utc')::date, '{OWN}', $1, $3, spent.model, 0, 0, spent.tokens, spent.duration_ms
from unnest($5::text[], $6::bigint[], $7::bigint[]) as spent(model, tokens, duration_ms)
order by spent.model
on conflict (day, source, username, chatbot_id, model) do update set
    tokens = d.tokens + excluded.tokens, duration_ms = d.duration_ms + excluded.duration_ms
"""


@dataclass(frozen=True, slots=True)
class Chat:
    """Which chat of ours, with which chatbot."""

    user_id: str
    id: str
    chatbot_id: str


@dataclass(frozen=True, slots=True)
class Spent:
    """What a model has cost in one run, in tokens and milliseconds."""

    model: str
    tokens: int
    duration_ms: int


async def asked(connection: Connection, chat: Chat, question: str, *, position: int, client_ip: str = "") -> None:
    """A user's message was saved at this position. To be called once for each, in the transaction that saved it."""
    await _said(connection, chat, "", client_ip, question[:QUESTION], position)


async def answered(connection: Connection, chat: Chat, *, model: str) -> None:
    """An answer of this model was saved; called like `asked`."""
    await _said(connection, chat, model, "", "", None)


async def _said(
    connection: Connection, chat: Chat, model: str, client_ip: str, question: str, position: int | None
) -> None:
    names = (chat.user_id, chat.id, chat.chatbot_id)
    await connection.execute(_SAID, *names, model, client_ip, question, position, random.randrange(_SLOTS))


async def spent(connection: Connection, chat: Chat, costs: Sequence[Spent]) -> None:
    """A run in this chat has ended and cost this; once for each, in the transaction that ends it. A model once."""
    if not costs:
        return
    await connection.execute(
        _SPENT,
        *(chat.user_id, chat.id, chat.chatbot_id, sum(cost.tokens for cost in costs)),
        [cost.model for cost in costs],
        [cost.tokens for cost in costs],
        [cost.duration_ms for cost in costs],
    )
