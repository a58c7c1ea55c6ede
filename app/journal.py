"""What operators read in the database: a row for every error a client was told of, and one for every answer."""

import asyncio
import hashlib
import traceback
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID, uuid4

import orjson

from app.expiry import Rows
from app.postgres import Connection, Pool
from app.telemetry import Metrics
from app.text import clean, redacted

# Bounds: rows waiting to be written, and rows per pass; what comes on top is counted and dropped.
_WAITING = 1000
_PER_PASS = 200

_COLUMNS = {
    "id": "uuid",
    "category": "text",
    "code": "text",
    "message": "text",
    "fingerprint": "text",
    "request_id": "text",
    "stream_id": "uuid",
    "session_id": "text",
    "chatbot_id": "text",
    "flow": "text",
    "attempt": "int",
    "context": "text",
    "stack": "text",
}
_ARRAYS = ", ".join(f"${number}::{kind}[]" for number, kind in enumerate(_COLUMNS.values(), 1))
_WRITE_ERRORS = f"""
insert into error_logs ({", ".join(_COLUMNS)}) select * from unnest({_ARRAYS}) on conflict do nothing
"""
_LAST_DAY = """
select count(*) as answers, count(*) filter (where status = 'failed') as failed,
       percentile_cont(0.5) within group (order by first_token_ms) as first_token_ms,
       percentile_cont(0.5) within group (order by tokens_per_s) as tokens_per_s,
       coalesce(sum(attempts), 0) as attempts
from conversation_processing_metrics where created_at > now() - interval '1 day'
"""
_LAST_ERRORS = """
select code, count(*) as times from error_logs
where created_at > now() - interval '1 day' and category = 'CONVERSATION_PROCESSING_ERROR'
group by code order by times desc, code limit 5
"""
_WRITE_RUN = """
insert into conversation_processing_metrics
    (stream_id, session_id, chatbot_id, flow_type, status, error_code, provider, model, events,
     prompt_tokens, completion_tokens, first_token_ms, duration_ms, mode, attempts, tokens_per_s, flows)
values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17)
on conflict do nothing
"""

# What a row may hold of context and stack together, in characters; of a stack the end is kept.
_DETAIL = 8 * 1024
_MESSAGE = 2000


@dataclass(frozen=True, slots=True)
class RunFigures:
    """One answer in figures; times in milliseconds. `flows` is a JSON object: each flow's outcome, times and tokens."""

    stream_id: UUID
    session_id: str
    chatbot_id: str
    flow_type: str
    status: str
    error_code: str | None
    provider: str
    model: str
    events: int
    prompt_tokens: int
    completion_tokens: int
    first_token_ms: int | None
    duration_ms: int
    mode: str
    attempts: int
    tokens_per_s: float | None
    flows: str


@dataclass(frozen=True, slots=True)
class About:
    """What an error happened to. `context` is for operators: small, and never a user's text."""

    request_id: str | None = None
    stream_id: UUID | None = None
    session_id: str | None = None
    chatbot_id: str | None = None
    flow: str | None = None
    attempt: int | None = None
    context: Mapping[str, Any] = field(default_factory=dict)


NOTHING = About()


class Journal:
    """Error rows are written behind the requests: an error storm or a database that is away costs no client time."""

    def __init__(self, pool: Pool, metrics: Metrics) -> None:
        self._pool = pool
        self._metrics = metrics
        self._rows: deque[tuple[Any, ...]] = deque()
        # A stopping server writes what is left while its loop may be writing, too.
        self._writing = asyncio.Lock()

    def record(
        self,
        code: str,
        message: str,
        *,
        about: About = NOTHING,
        error: BaseException | None = None,
        category: str = "CONVERSATION_PROCESSING_ERROR",
    ) -> str:
        """Note an error, with the stack of `error`; returns the `error_id` to tell the client."""
        if len(self._rows) >= _WAITING:
            return self.drop(code)
        error_id = self._counted(code)
        context = redacted(orjson.dumps(about.context, default=repr).decode())[:_DETAIL]
        stack = _stack(error)[-(_DETAIL - len(context)) :] if error is not None and len(context) < _DETAIL else None
        self._rows.append(
            (
                error_id,
                category,
                code,
                redacted(clean(message[: 4 * _MESSAGE]))[:_MESSAGE],
                _fingerprint(category, code, about, error),
                about.request_id,
                about.stream_id,
                about.session_id,
                about.chatbot_id,
                about.flow,
                about.attempt,
                context,
                stack,
            )
        )
        return str(error_id)

    def count(self, code: str) -> str:
        """An error that deserves no row; returns an id all the same."""
        return str(self._counted(code))

    def drop(self, code: str) -> str:
        """One that deserves a row and has none, as too many came."""
        self._metrics.journal_dropped.inc()
        return self.count(code)

    def _counted(self, code: str) -> UUID:
        self._metrics.errors.labels(code).inc()
        return uuid4()

    async def run_once(self) -> int:
        """Write what waits, up to one pass; returns how many rows. On failure they wait for the next pass."""
        async with self._writing:
            rows = [self._rows[i] for i in range(min(_PER_PASS, len(self._rows)))]
            if rows:
                await self._pool.execute(_WRITE_ERRORS, *map(list, zip(*rows, strict=True)))
                for _ in rows:
                    self._rows.popleft()
            return len(rows)


def _stack(error: BaseException) -> str:
    return redacted(clean("".join(traceback.format_exception(error))))


def _fingerprint(category: str, code: str, about: About, error: BaseException | None) -> str:
    """The same for errors of the same kind at the same place, whoever met them."""
    frames = traceback.extract_tb(error.__traceback__) if error is not None else []
    place = f"{type(error).__name__}:{frames[-1].name}" if frames else ""
    parts = "\0".join((category, code, about.chatbot_id or "", about.flow or "", place))
    return hashlib.sha256(parts.encode(errors="replace")).hexdigest()[:16]


async def record_run(connection: Connection, figures: RunFigures) -> None:
    """Note an answer's figures in the transaction that ends it."""
    await connection.execute(_WRITE_RUN, *(getattr(figures, field) for field in RunFigures.__slots__))


async def last_day(connection: Connection) -> list[str]:
    """What operators should know of the last 24 hours, in a sentence each: the answers, and what went wrong."""
    row = await connection.fetchrow(_LAST_DAY)
    assert row is not None
    told = [f"{row['answers']} answers in 24 hours, {row['failed']} failed, {row['attempts']} calls of providers"]
    if row["first_token_ms"] is not None:
        told[0] += f"; half of the first tokens within {row['first_token_ms']:.0f} ms"
    if row["tokens_per_s"] is not None:
        told[0] += f", {row['tokens_per_s']:.0f} tokens/s"
    if errors := await connection.fetch(_LAST_ERRORS):
        told.append("most frequent: " + ", ".join(f"{row['code']} ({row['times']})" for row in errors))
    return told


def errors_expiring(keep_s: float) -> Rows:
    return Rows("error_logs", "created_at", keep_s)


def figures_expiring(keep_s: float) -> Rows:
    return Rows("conversation_processing_metrics", "created_at", keep_s)
