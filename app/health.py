"""What load balancers and operators ask: is the process alive, is it ready, how is it."""

from datetime import UTC, datetime
from typing import Any, TypedDict

import orjson
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import Response

from app import __version__
from app.flows.runner import Runner
from app.postgres import AWAY, Pool, prompt_connection
from app.streams.bus import Bus
from app.streams.replicas import Replica
from app.telemetry import Metrics

# Health answers within this time even when the database hangs or the pool is exhausted.
_PROBE_S = 1.0


class Needs(TypedDict):
    pool: Pool
    replica: Replica
    bus: Bus
    runner: Runner
    metrics: Metrics
    failing: set[str]


async def livez(request: Request[Needs]) -> Response:
    """The process runs and its loop turns; nothing else is asked, so that no outage elsewhere restarts us."""
    return _json({"status": "alive"})


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
    return _json(answer, 200 if ready else 503)


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
        "timestamp": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
    }
    return _json(answer, 200 if serving else 503)


async def metrics(request: Request[Needs]) -> Response:
    """Prometheus' text format."""
    return Response(generate_latest(request.state["metrics"].registry), media_type=CONTENT_TYPE_LATEST)


async def _connected(request: Request[Needs]) -> bool:
    """Whether the database answers, and takes this replica's heartbeats: a standby answers, too."""
    replica = request.state["replica"]
    try:
        async with prompt_connection(request.state["pool"], _PROBE_S) as connection:
            await connection.fetchval("select 1")
    except AWAY:
        return False
    return replica.beating or replica.refusal is not None


def _json(answer: dict[str, Any], status: int = 200) -> Response:
    return Response(orjson.dumps(answer), status, {"Cache-Control": "no-store"}, "application/json")
