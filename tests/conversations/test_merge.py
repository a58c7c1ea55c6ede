"""What is merged into the index is what the rows add up to, whatever the groups they come in and their order."""

from collections.abc import AsyncGenerator
from dataclasses import astuple
from random import Random
from typing import Any

import asyncpg
import pytest

from app.conversations import index
from app.conversations.summary import KEYS, Said, Summaries, fold
from tests.conversations.rows import random_row

_CONVERSATIONS = """
select username, conversation_id, message_count, total_tokens, first_message_at, last_message_at,
    first_question_rank, first_question, last_question_rank, last_question, model_rank, model,
    client_ip_rank, client_ip, chatbot_id_rank, chatbot_id, message_ranks, message_ids
from conversations where source = 'n8n' order by username, conversation_id
"""
_DAYS = """
select day, chatbot_id, model, username, messages, questions, tokens, duration_ms from conversation_days
where source = 'n8n'
"""


@pytest.fixture
async def connection(database: str) -> AsyncGenerator[asyncpg.Connection, None]:
    connection = await asyncpg.connect(database)
    yield connection
    await connection.close()


def expected(summaries: Summaries) -> list[tuple[Any, ...]]:
    def pair(ranked: tuple[int, str] | None) -> tuple[Any, str]:
        return ranked or (None, "")

    return [
        (
            *(*name, of.messages, of.tokens, of.first_at, of.last_at),
            *(*pair(of.first_question), *pair(of.last_question)),
            *(*pair(of.model), *pair(of.client_ip), *pair(of.chatbot_id)),
            *([rank for rank, _ in of.keys], [key for _, key in of.keys]),
        )
        for name, of in sorted(summaries.items())
    ]


def days_of(summaries: Summaries) -> dict[tuple[Any, ...], tuple[int, ...]]:
    days: dict[tuple[Any, ...], tuple[int, ...]] = {}
    for (username, _), summary in summaries.items():
        for day, figures in summary.days.items():
            before = days.get((*day, username), (0, 0, 0, 0))
            days[*day, username] = tuple(a + b for a, b in zip(before, astuple(figures), strict=True))
    return days


@pytest.mark.parametrize("seed", range(3))
async def test_any_groups_in_any_order_give_the_same(connection: asyncpg.Connection, seed: int) -> None:
    chance = Random(seed)
    rows = [random_row(chance, number) for number in range(1500)]
    chance.shuffle(rows)
    created = 0
    summaries = fold(rows)
    while rows:
        size = chance.randrange(1, 400)
        created += await index.merge(connection, "n8n", fold(rows[:size]))
        del rows[:size]
    assert [tuple(row) for row in await connection.fetch(_CONVERSATIONS)] == expected(summaries)
    assert any(len(summary.keys) == KEYS for summary in summaries.values())
    found = await connection.fetch(_DAYS)
    assert {tuple(row)[:4]: tuple(row)[4:] for row in found} == days_of(summaries)
    counted = await connection.fetchval("select sum(conversations) from conversation_counts where source = 'n8n'")
    assert created == counted == len(summaries)


async def test_what_has_no_time_gets_that_of_its_discovery(connection: asyncpg.Connection) -> None:
    await index.merge(connection, "n8n", fold([Said("c", "", 1, "1", "user", question="Why?")]))
    row = await connection.fetchrow("select *, last_message_at = parley_now() as is_now from conversations")
    assert row is not None
    assert row["time_source"] == "discovery"
    assert await connection.fetchval("select count(*) from conversation_days where day = current_date") == 1


async def test_nothing_is_merged_as_nothing(connection: asyncpg.Connection) -> None:
    assert await index.merge(connection, "n8n", {}) == 0
