"""What operators see: structured logs with request and stream ids, and the Prometheus metrics of one server.

Message texts, keys and query strings are never logged. Each server has a registry of its own, so that several in
one process count for themselves.
"""

import logging
import re
import sys
from collections.abc import Iterator
from functools import partial
from time import time
from typing import Any, TextIO, cast

import orjson
import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.text import without_keys

_MILLISECONDS = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.125, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


# Each gives how a metric is made, for the server that has it.
def _counter(name: str, text: str, *labels: str) -> Counter:
    return cast(Counter, partial(Counter, name, text, labels))


def _gauge(name: str, text: str, *labels: str) -> Gauge:
    return cast(Gauge, partial(Gauge, name, text, labels))


def _histogram(name: str, text: str, buckets: tuple[float, ...] = _MILLISECONDS) -> Histogram:
    return cast(Histogram, partial(Histogram, name, text, buckets=buckets))


class Metrics:
    """All metrics of one server, made with it. Times are seconds; the GenAI ones are named after OpenTelemetry's
    conventions.
    """

    # Answers, and the providers that give them.
    first_token = _histogram(
        "gen_ai_client_time_to_first_token_seconds", "From the accepted message to the first token."
    )
    tokens = _counter("gen_ai_client_token_usage_tokens", "Tokens as providers count them.", "kind")
    attempts = _counter("parley_attempts", "Calls of providers, by provider and outcome.", "provider", "outcome")
    active_streams = _gauge("parley_active_streams", "Answers under way on this replica.")
    streams_ended = _counter("parley_streams_ended", "Answers ended, by status.", "status")
    takeovers = _counter("parley_takeovers", "Streams of dead replicas taken over, by what became of them.", "how")

    # The log, its readers, and what the replicas tell each other of it. The integers are shown by _EventCounts.
    added_latency = _histogram(
        "parley_event_added_latency_seconds", "From the arrival of a flush's oldest event to its commit."
    )
    flush_events = _histogram("parley_flush_events", "Events per flush of the log.", _COUNTS)
    flush_seconds = _histogram("parley_flush_seconds", "Time of a flush, commit included.")
    readers = _gauge("parley_readers", "Connected SSE readers.")
    events_stored = 0
    events_delivered = 0
    events_lost = 0
    events_doubled = 0
    bus_notifications = _counter(
        "parley_bus_notifications", "Notifications between replicas, by direction.", "direction"
    )
    bus_echo = _histogram("parley_bus_echo_seconds", "From a notification of this replica to itself to hearing it.")

    # What was refused, and what went wrong.
    errors = _counter("parley_errors", "Errors by their stable code.", "code")
    limited = _counter("parley_limited", "Requests refused by a limit, by what and whose it is.", "limit", "of")
    journal_dropped = _counter("parley_journal_dropped", "Error rows dropped because too many came at once.")

    # Devices.
    sync_exchanges = _counter(
        "parley_sync_exchanges", "Exchanges of devices, by outcome: done, or an error's code.", "outcome"
    )
    sync_seconds = _histogram("parley_sync_seconds", "Time of an exchange.")
    sync_mutations = _histogram("parley_sync_mutations", "New mutations of an exchange.", (0, *_COUNTS))
    sync_rows = _histogram("parley_sync_rows", "Chats and messages an exchange has written.", (0, *_COUNTS))
    sync_bytes = _counter("parley_sync_bytes", "Bytes of bodies of exchanges, by direction.", "direction")
    sync_conflicts = _counter(
        "parley_sync_conflicts", "Operations that did not become what they said, by status.", "status"
    )
    sync_bootstraps = _counter("parley_sync_bootstraps", "Devices that began anew, by reason.", "why")
    sync_failed = _counter(
        "parley_sync_failed_messages", "Failed messages that were brought, and that a retry has mended.", "what"
    )
    nudges = _counter("parley_sync_nudges", "Nudges that devices were sent: there is something to pull.")

    # Periodic jobs.
    job_runs = _counter("parley_job_runs", "Passes of periodic jobs, by outcome.", "job", "outcome")
    job_rows = _counter("parley_job_rows", "What periodic jobs have done, in rows.", "job")
    job_seconds = _gauge("parley_job_seconds", "Time of a job's last pass here.", "job")
    job_due = _gauge("parley_job_due_timestamp_seconds", "When a job is due next.", "job")
    job_ended = _gauge("parley_job_ended_timestamp_seconds", "When a job's last pass ended.", "job")
    job_failures = _gauge("parley_job_failures", "Failures of a job since it last went well.", "job")

    # The sources of the index, and whether it is what they say.
    discovery_seconds = _gauge("parley_discovery_seconds", "Time of the last pass over a source.", "source")
    discovery_rows = _counter("parley_discovery_rows", "Rows of sources that were read.", "source")
    discovery_sessions = _counter(
        "parley_discovery_sessions", "Conversations in which passes found something new.", "source"
    )
    discovery_created = _counter(
        "parley_discovery_created", "Conversations that passes found for the first time.", "source"
    )
    discovery_skipped = _counter(
        "parley_discovery_skipped", "Rows that are not indexed, by reason.", "source", "reason"
    )
    discovery_conversations = _gauge(
        "parley_discovery_conversations", "Conversations in the index.", "source", "client"
    )
    discovery_lag = _gauge("parley_discovery_lag_seconds", "Since a pass last came to the end of a source.", "source")
    discovery_failures = _gauge(
        "parley_discovery_failures", "Failed passes over a source since one went well.", "source"
    )
    discovery_error_rate = _gauge(
        "parley_discovery_error_ratio", "Share of failures among the last 100 passes here.", "source"
    )
    discovery_last = _gauge(
        "parley_discovery_last_timestamp_seconds", "When the last pass over a source ended.", "source"
    )
    reconcile_compared = _counter(
        "parley_reconcile_compared", "Conversations of the index that were compared.", "source"
    )
    reconcile_drift = _counter(
        "parley_reconcile_drift", "Conversations of the index that were wrong, and put right.", "source"
    )
    reconcile_last = _gauge(
        "parley_reconcile_last_timestamp_seconds", "When a round of comparing last came to its end.", "source"
    )
    index_drift = _gauge(
        "parley_index_drift", "Conversations that were put right in the round under way, or the last.", "source"
    )

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EventCounts(self))
        for name, make in vars(Metrics).items():
            if isinstance(make, partial):
                setattr(self, name, make(registry=self.registry))


_EVENT_COUNTS = {
    "events_stored": "Events committed to the log.",
    "events_delivered": "Events handed to SSE readers and pollers.",
    "events_lost": "Gaps seen by readers. Must stay 0.",
    "events_doubled": "Repeated events seen by readers. Must stay 0.",
}


class _EventCounts(Collector):
    """What is counted for each event is a plain integer, of one loop: a Counter takes a lock every time."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._created = time()

    def collect(self) -> Iterator[CounterMetricFamily]:
        for name, text in _EVENT_COUNTS.items():
            count = getattr(self._metrics, name)
            family = CounterMetricFamily(f"parley_{name}", text)
            family.add_metric((), count, created=self._created)
            yield family


def configure_logging(level: str, form: str, *, stream: TextIO = sys.stderr) -> None:
    """Route structlog and the standard library's loggers through one processor chain to `stream`."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(stream)
    rendering = [structlog.stdlib.ProcessorFormatter.remove_processors_meta, _renderer(form)]
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=rendering))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    for noisy in ("uvicorn", "asyncio", "httpx2", "aiohttp", "alembic"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, root.level))


def _renderer(form: str) -> structlog.typing.Processor:
    if form == "json":
        return structlog.processors.JSONRenderer(serializer=_serialized)
    return structlog.dev.ConsoleRenderer(colors=False)


def _serialized(line: object, **_: object) -> str:
    return orjson.dumps(line, default=repr).decode()


_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class RequestIds:
    """ASGI middleware: every request has an id, the client's if it is harmless; it is in each log line and answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _given_id(scope) or _new_id()
        scope["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            await self._app(scope, receive, send_with_id)


def _given_id(scope: Scope) -> str | None:
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    given = next((value for name, value in headers if name == b"x-request-id"), b"").decode("latin-1")
    # One that looks like a secret is none of an id: it would stand in each log line.
    return given if _REQUEST_ID.fullmatch(given) and without_keys(given) == given else None


def _new_id() -> str:
    import uuid

    return uuid.uuid4().hex


def request_id(scope: dict[str, Any] | Scope) -> str | None:
    value = scope.get("request_id")
    return value if isinstance(value, str) else None
