"""What load balancers and operators ask: is the process alive, is it ready, how is it."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from time import monotonic
from typing import Any, TypedDict

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import Response

from app import __version__
from app.answers import private_json, time_of
from app.flows.runner import Runner
from app.postgres import AWAY, Pool, prompt_connection
from app.streams.bus import Bus
from app.streams.replicas import Replica
from app.telemetry import Metrics

# Health answers within this time even when the database hangs or the pool is exhausted.
_PROBE_S = 1.0
# How long an answer of the database is as good as a new one, in seconds.
_FRESH_S = 0.1


class Probe:
    """Whether the database answers: asked once for all who want to know at the same time.

    Over connections that are kept apart from the pool, so that nobody's work keeps health from answering. `on_silence`
    is called when one of them has died without a word.
    """

    def __init__(self, reserve: Pool, *, on_silence: Callable[[], Awaitable[None]]) -> None:
        self._reserve = reserve
        self._on_silence = on_silence
        self._turn = asyncio.Lock()
        self._asked_at = 0.0
        self._answers = False

    async def answers(self) -> bool:
        async with self._turn:
            if monotonic() - self._asked_at > _FRESH_S:
                self._answers = await self._ask()
                self._asked_at = monotonic()
            return self._answers

    async def _ask(self) -> bool:
        try:
            async with prompt_connection(self._reserve, _PROBE_S) as connection:
                await connection.fetchval("select 1")
        except AWAY as error:
            if self._answers and isinstance(error, TimeoutError):
                await self._on_silence()
            return False
        return True


class Needs(TypedDict):
    probe: Probe
    replica: Replica
    bus: Bus
    runner: Runner
    metrics: Metrics
    failing: set[str]


async def livez(request: Request[Needs]) -> Response:
    """The process runs and its loop turns; nothing else is asked, so that no outage elsewhere restarts us."""
    return private_json({"status": "alive"})


async def readyz(request: Request[Needs]) -> Response:
    """Whether new work may be sent here: the database answers, the schema fits, and we are not leaving."""
    refusal = request.state["replica"].refusal
    connected = await _connected(request)
    ready = refusal is None and connected
    answer: dict[str, Any] = {"status": "ready" if ready else "not ready"}
    if "verbose" in request.query_params:
        answer |= {
            "database": "connected" if connected else "disconnected",
            "refusal": refusal.detail if refusal else None,
            "failing": sorted(request.state["failing"]),
            "bus": request.state["bus"].state(),
            "replica": str(request.state["replica"].id),
            "version": __version__,
        }
    return private_json(answer, status=200 if ready else 503)


async def conversation_health(request: Request[Needs]) -> Response:
    """The load balancer's check. Unhealthy (503) is no database, or starting, or draining; degraded (200) is serving
    while a background job fails, or while notifications do not come and readers poll."""
    connected = await _connected(request)
    serving = connected and request.state["replica"].refusal is None
    fine = "degraded" if request.state["failing"] else "healthy"
    answer = {
        "status": fine if serving else "unhealthy",
        "database": "connected" if connected else "disconnected",
        "active_streams": request.state["runner"].active,
        "timestamp": time_of(datetime.now(UTC)),
    }
    return private_json(answer, status=200 if serving else 503)


async def metrics(request: Request[Needs]) -> Response:
    """Prometheus' text format."""
    page = generate_latest(request.state["metrics"].registry)
    return Response(page, headers={"Cache-Control": "no-store"}, media_type=CONTENT_TYPE_LATEST)


async def _connected(request: Request[Needs]) -> bool:
    """Whether the database answers, and takes this replica's heartbeats: a standby answers, too."""
    replica = request.state["replica"]
    return await request.state["probe"].answers() and (replica.beating or replica.refusal is not None)
