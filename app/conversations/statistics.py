"""What conversations add up to over days: read from rows that were added up as messages were saved."""

from collections.abc import Sequence
from datetime import date
from typing import Literal

import asyncpg

from app.postgres import Connection

Group = Literal["day", "model", "user", "chatbot"]
# The most groups of an answer: the largest of them, and of days the last.
GROUPS = 1_000

_COLUMNS = {"day": "day", "model": "model", "user": "username", "chatbot": "chatbot_id"}
_STATISTICS = """
select {column} as name, sum(messages)::bigint as messages, sum(questions)::bigint as questions,
    sum(tokens)::bigint as tokens, sum(duration_ms)::bigint as duration_ms
from conversation_days
where day >= $1 and day < $2 and ($3::text is null or username = $3) and ($4::text is null or source = $4)
group by {column} order by {order} desc, name limit $5
"""


async def statistics(
    connection: Connection, group: Group, *, since: date, until: date, username: str | None, source: str | None
) -> Sequence[asyncpg.Record]:
    """Figures per day, model, user or chatbot, of the days from `since`, before `until`, in UTC."""
    order = "name" if group == "day" else "sum(messages)"
    sql = _STATISTICS.format(column=_COLUMNS[group], order=order)
    return await connection.fetch(sql, since, until, username, source, GROUPS)
