"""What was used: the usage ledger, one row per attempt of a flow and written by runs only, and its sums by day.

A row of the ledger is added to its day by the statement that marks it as added, so once, whatever is killed; what is
not marked yet is counted from the ledger itself. Nothing that is synchronised or imported has to do with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime
from time import monotonic
from typing import Literal
from uuid import UUID

import asyncpg

from app.postgres import Connection, Pool, retry_conflicts

Outcome = Literal["completed", "failed", "cancelled"]
Group = Literal["day", "model", "chatbot"]
# The most groups of an answer: the largest of them, and of days the last.
GROUPS = 1_000
# Rows of the ledger that one statement adds up, and how long a pass takes, in seconds.
_PIECE = 5_000
_PASS_S = 30

_RECORD = """
insert into usage_ledger (stream_id, flow, attempt, user_id, chatbot_id, provider, model, outcome,
                          error_code, prompt_tokens, completion_tokens, first_token_ms, duration_ms, started_at,
                          chat_id)
values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15)
on conflict (stream_id, flow, attempt) do nothing
"""
# Days are those of UTC, by the database's clock when the attempt was recorded: no row comes into another day later.
_DAY = "(created_at at time zone 'UTC')::date"
# Two passes at once add up different rows, and take the days' rows in one order. In the order of the index of what is
# fresh, so that nothing else of the ledger is looked at, whatever the planner believes of it.
_ADD_UP = f"""
with fresh as (
    select stream_id, flow, attempt from usage_ledger where not is_added_up order by user_id limit $1
    for update skip locked),
added as (
    update usage_ledger l set is_added_up = true from fresh f
    where (l.stream_id, l.flow, l.attempt) = (f.stream_id, f.flow, f.attempt) and not l.is_added_up
    returning l.*),
summed as (
    insert into user_usage_daily as d (user_id, day, chatbot_id, model, calls, failed, prompt_tokens,
        completion_tokens, duration_ms)
    select user_id, {_DAY}, chatbot_id, model, count(*), count(*) filter (where outcome = 'failed'),
        sum(prompt_tokens), sum(completion_tokens), sum(duration_ms)
    from added group by 1, 2, 3, 4 order by 1, 2, 3, 4
    on conflict (user_id, day, chatbot_id, model) do update set calls = d.calls + excluded.calls,
        failed = d.failed + excluded.failed, prompt_tokens = d.prompt_tokens + excluded.prompt_tokens,
        completion_tokens = d.completion_tokens + excluded.completion_tokens,
        duration_ms = d.duration_ms + excluded.duration_ms, updated_at = now())
select count(*) from added
"""
# One statement, so one snapshot: each row of the ledger is in one of the two.
_USED = f"""
select {{column}} as name, sum(calls)::bigint as calls, sum(failed)::bigint as failed,
    sum(prompt_tokens)::bigint as prompt_tokens, sum(completion_tokens)::bigint as completion_tokens,
    sum(duration_ms)::bigint as duration_ms
from (
    select day, chatbot_id, model, calls, failed, prompt_tokens, completion_tokens, duration_ms
    from user_usage_daily where day >= $1 and day < $2 and {{whose}}
    union all
    select {_DAY}, chatbot_id, model, 1, (outcome = 'failed')::int, prompt_tokens, completion_tokens, duration_ms
    from usage_ledger where not is_added_up and {_DAY} >= $1 and {_DAY} < $2 and {{whose}}) used
group by {{column}} order by {{order}} desc, name limit $3
"""
_COLUMNS = {"day": "day", "model": "model", "chatbot": "chatbot_id"}


@dataclass(frozen=True, slots=True)
class Entry:
    """One call of a provider for one flow; times in milliseconds."""

    stream_id: UUID
    flow: str
    attempt: int
    user_id: str
    chatbot_id: str
    provider: str
    model: str
    outcome: Outcome
    error_code: str | None
    prompt_tokens: int
    completion_tokens: int
    first_token_ms: int | None
    duration_ms: int
    started_at: datetime
    chat_id: str


async def record(connection: Connection, entries: Sequence[Entry]) -> None:
    """Recording an attempt again changes nothing."""
    for entry in entries:
        await connection.execute(_RECORD, *(getattr(entry, field) for field in Entry.__slots__))


@dataclass(frozen=True, slots=True)
class UsageDays:
    """Adds up what is fresh in the ledger: bounded per statement and per pass, by any number of replicas at once."""

    pool: Pool
    piece: int = _PIECE

    async def run_once(self) -> int:
        """Returns how many rows of the ledger were added up."""
        until, done = monotonic() + _PASS_S, 0
        while monotonic() < until:
            added = await retry_conflicts(lambda: self.pool.fetchval(_ADD_UP, self.piece))
            done += added
            if added < self.piece:
                break
        return done


async def used(
    connection: Connection, group: Group, *, since: date, until: date, user_id: str | None
) -> Sequence[asyncpg.Record]:
    """Figures per day, model or chatbot of a user, or of everybody: the days from `since`, before `until`, in UTC.

    Up to date, however late the adding up is.
    """
    order = "name" if group == "day" else "sum(prompt_tokens + completion_tokens)"
    whose, names = ("true", ()) if user_id is None else ("user_id = $4", (user_id,))
    sql = _USED.format(column=_COLUMNS[group], order=order, whose=whose)
    return await connection.fetch(sql, since, until, GROUPS, *names)
