"""What the routes of health, metrics and of this description take and answer."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel

from app.openapi import Answer, Content, Operation, Parameter

_JSON = "application/json"


class ConversationHealth(BaseModel):
    """How this replica is. `active_streams` are the answers under way on it."""

    status: Literal["healthy", "degraded", "unhealthy"]
    database: Literal["connected", "disconnected"]
    active_streams: int
    timestamp: str


class Liveness(BaseModel):
    """The process runs."""

    status: Literal["alive"]


class Readiness(BaseModel):
    """Whether new work may be sent here; all but `status` only with `?verbose`."""

    status: Literal["ready", "not ready"]
    database: Literal["connected", "disconnected"] | None = None
    refusal: str | None = None
    failing: list[str] | None = None
    bus: dict[str, object] | None = None
    replica: str | None = None
    version: str | None = None


_HEALTH: dict[str, Any] = {
    "status": "healthy",
    "database": "connected",
    "active_streams": 5,
    "timestamp": "2024-01-01T12:00:00.000Z",
}

_CONVERSATION_HEALTH = Operation(
    "Health for load balancers",
    "`degraded` serves, but something needs an operator. `unhealthy` is no database, starting or stopping. "
    "Answers within about a second even when the database hangs.",
    answers={
        200: Answer("Serving: healthy or degraded.", {_JSON: Content(_HEALTH, ConversationHealth)}),
        503: Answer(
            "Unhealthy: send no requests here.",
            {_JSON: Content(_HEALTH | {"status": "unhealthy", "database": "disconnected"}, ConversationHealth)},
        ),
    },
)

_LIVEZ = Operation(
    "Is the process alive?",
    "Asks the process and its loop only, so that no outage elsewhere restarts it.",
    answers={200: Answer("Alive.", {_JSON: Content({"status": "alive"}, Liveness)})},
)

_READYZ = Operation(
    "May new work be sent here?",
    "The database answers, its schema fits, and the server is not stopping. With `?verbose` it says why not, for which "
    "it needs the scope `admin`.",
    answers={
        200: Answer("Ready.", {_JSON: Content({"status": "ready"}, Readiness)}),
        503: Answer("Not ready.", {_JSON: Content({"status": "not ready"}, Readiness)}),
    },
    parameters=[
        Parameter("verbose", "query", "Present, whatever its value: say why."),
    ],
)

_METRICS = Operation(
    "Prometheus metrics",
    "In Prometheus' text format; docs/operations.md says what each means.",
    answers={
        200: Answer(
            "The metrics of this replica.",
            {"text/plain": Content("# TYPE parley_active_streams gauge\nparley_active_streams 5.0\n")},
        )
    },
)

_OPENAPI = Operation(
    "This document",
    "OpenAPI 3.1.",
    answers={200: Answer("The document.", {_JSON: Content({"openapi": "3.1.0"}, schema={"type": "object"})})},
)

_DOCS = Operation(
    "This API to read and try",
    "A page that needs nothing but this server.",
    answers={200: Answer("The page.", {"text/html": Content("<!doctype html>")}, headers=["Content-Security-Policy"])},
)

SERVICE: Mapping[tuple[str, str], Operation] = {
    ("GET", "/api/conversation-health"): _CONVERSATION_HEALTH,
    ("GET", "/livez"): _LIVEZ,
    ("GET", "/readyz"): _READYZ,
    ("GET", "/metrics"): _METRICS,
    ("GET", "/openapi.json"): _OPENAPI,
    ("GET", "/docs"): _DOCS,
}
