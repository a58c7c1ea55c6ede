"""The usage ledger: one row per attempt of a flow, written by runs only."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal
from uuid import UUID

from app.postgres import Connection

Outcome = Literal["completed", "failed", "cancelled"]

_RECORD = """
insert into usage_ledger (stream_id, flow, attempt, user_id, chatbot_id, provider, model, outcome,
                          error_code, prompt_tokens, completion_tokens, first_token_ms, duration_ms, started_at,
                          chat_id)
values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15)
on conflict (stream_id, flow, attempt) do nothing
"""


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
