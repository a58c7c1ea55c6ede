"""What operators read in the database: a row for every error a client was told of, and one for every answer."""

from collections import deque
from dataclasses import dataclass
from uuid import UUID, uuid4

from app.postgres import Connection, Pool
from app.telemetry import Metrics
from app.text import clean

# Bounds: rows waiting to be written, and rows per pass; what comes on top is counted and dropped.
_WAITING = 1000
_PER_PASS = 200

_WRITE_ERRORS = """
insert into error_logs (id, category, code, message, request_id, stream_id)
select * from unnest($1::uuid[], $2::text[], $3::text[], $4::text[], $5::text[], $6::uuid[])
on conflict do nothing
"""
_WRITE_RUN = """
insert into conversation_processing_metrics
    (stream_id, session_id, chatbot_id, flow_type, status, error_code, provider, model, events,
     prompt_tokens, completion_tokens, first_token_ms, duration_ms, mode, attempts, tokens_per_s, flows)
values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17)
on conflict do nothing
"""

_Row = tuple[UUID, str, str, str, str | None, UUID | None]


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


class Journal:
    """Error rows are written behind the requests: an error storm or a database that is away costs no client time."""

    def __init__(self, pool: Pool, metrics: Metrics) -> None:
        self._pool = pool
        self._metrics = metrics
        self._rows: deque[_Row] = deque()

    def record(
        self,
        code: str,
        message: str,
        *,
        request_id: str | None = None,
        stream_id: UUID | None = None,
        category: str = "CONVERSATION_PROCESSING_ERROR",
    ) -> str:
        """Note an error; returns the `error_id` to tell the client."""
        self._metrics.errors.labels(code).inc()
        error_id = uuid4()
        if len(self._rows) < _WAITING:
            self._rows.append((error_id, category, code, clean(message)[:2000], request_id, stream_id))
        else:
            self._metrics.journal_dropped.inc()
        return str(error_id)

    async def run_once(self) -> int:
        """Write what waits, up to one pass; returns how many rows. On failure they wait for the next pass."""
        rows = [self._rows[i] for i in range(min(_PER_PASS, len(self._rows)))]
        if rows:
            await self._pool.execute(_WRITE_ERRORS, *map(list, zip(*rows, strict=True)))
            for _ in rows:
                self._rows.popleft()
        return len(rows)


async def record_run(connection: Connection, figures: RunFigures) -> None:
    """Note an answer's figures in the transaction that ends it."""
    await connection.execute(_WRITE_RUN, *(getattr(figures, field) for field in RunFigures.__slots__))
