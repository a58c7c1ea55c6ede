"""POST /api/webhooks/conversation-complete and GET /api/discovery/status: validation at the edge."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from time import time
from typing import TypedDict

from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response

from app.answers import private_json, time_of
from app.conversations import source_state
from app.conversations.index import OWN
from app.conversations.passes import Passes, complaint
from app.conversations.rounds import Round, rounds
from app.conversations.source_state import Told
from app.conversations.sources.source import Source, all_sources
from app.conversations.webhook import is_received, receive, verify
from app.errors import NotFound, Unavailable
from app.postgres import Pool
from app.text import PRINTABLE, clean, parse_object, validated

# A webhook names one conversation.
BODY_LIMIT = 16 * 1024
# Longest pass that a webhook waits for, in seconds.
_PASS_S = 5.0
_IS_INDEXED = "select exists (select from conversations where source = $1 and conversation_id = $2)"


class Needs(TypedDict):
    pool: Pool
    passes: Passes
    webhook_secrets: Sequence[bytes]
    discovery_cron: str
    discovery_next: Callable[[], Awaitable[datetime | None]]


class ConversationComplete(BaseModel):
    """`crew_code` is the code that the configuration gives a source."""

    session_id: str = Field(min_length=1, max_length=1024)
    crew_code: str = Field(min_length=1, max_length=256, pattern=PRINTABLE)


class ConversationCompleteAnswer(BaseModel):
    """`indexed`: the conversation is in the index. `new`: conversations found for the first time."""

    success: bool
    source: str
    indexed: bool
    new: int
    replayed: bool


class SourceFailure(BaseModel):
    """What went wrong last."""

    code: str
    detail: str


class SourceStatus(BaseModel):
    """A source as its passes have left it. `watermark`: every id up to it is read, whatever is committed late."""

    source: str
    crewCode: str
    client: str
    enabled: bool
    lastRun: str | None
    lastComplete: str | None
    lagSeconds: float | None
    watermark: int | None
    conversations: int
    rows: int
    skipped: dict[str, int]
    lastSessions: int
    lastRows: int
    lastSeconds: float
    consecutiveFailures: int
    error: SourceFailure | None
    lastReconcile: str | None
    drift: int


class ChatsStatus(BaseModel):
    """Of our own chats. `drift`: conversations that were wrong, and put right, in the comparison under way, or the
    last; `compared` so many."""

    lastReconcile: str | None
    compared: int
    drift: int


class DiscoveryStatus(BaseModel):
    """`alerts` are sentences for operators."""

    cron: str
    lastRun: str | None
    nextRun: str | None
    alerts: list[str]
    chats: ChatsStatus
    sources: list[SourceStatus]


async def conversation_complete(request: Request[Needs]) -> Response:
    """Index a conversation of a source now."""
    state = request.state
    body = await request.body()
    webhook_id = verify(request.headers, body, secrets=state["webhook_secrets"], now=time())
    wanted = validated(ConversationComplete, parse_object(body))
    async with state["pool"].acquire() as connection:
        sources = [source for source in await all_sources(connection) if source.enabled]
    source = next((source for source in sources if source.code == wanted.crew_code), None)
    if source is None:
        raise NotFound("source_unknown", "No source has this crew_code.")
    replayed = await is_received(state["pool"], webhook_id)
    new = 0 if replayed else await _index(state["passes"], source)
    if not replayed:
        await receive(state["pool"], webhook_id)
    indexed = await state["pool"].fetchval(_IS_INDEXED, source.id, clean(wanted.session_id))
    answer = ConversationCompleteAnswer(success=True, source=source.id, indexed=indexed, new=new, replayed=replayed)
    return private_json(answer)


async def _index(passes: Passes, source: Source) -> int:
    result = await passes.at_once(source, seconds=_PASS_S)
    if result.error_code is not None:
        raise Unavailable("source_unavailable", "The source cannot be read now; send it again.", retry_after=10)
    return result.found.created


async def discovery_status(request: Request[Needs]) -> Response:
    """How discovery is doing, source by source."""
    state = request.state
    told, next_at, compared = await asyncio.gather(
        source_state.told(state["pool"]), state["discovery_next"](), rounds(state["pool"])
    )
    own = compared.get(OWN, Round(OWN))
    alerts = [f"source {one.source} {said}" for one in told if one.is_enabled and (said := complaint(one))]
    runs = [one.last_discovered_at for one in told if one.last_discovered_at is not None]
    answer = DiscoveryStatus(
        cron=state["discovery_cron"],
        lastRun=_iso(max(runs, default=None)),
        nextRun=_iso(next_at),
        alerts=alerts,
        chats=ChatsStatus(lastReconcile=_iso(own.ended_at), compared=own.compared, drift=own.drift),
        sources=[_status(one) for one in told],
    )
    return private_json(answer)


def _status(told: Told) -> SourceStatus:
    failure = SourceFailure(code=told.last_error_code, detail=told.last_error or "") if told.last_error_code else None
    return SourceStatus(
        source=told.source,
        crewCode=told.crew_code,
        client=told.client,
        enabled=told.is_enabled,
        lastRun=_iso(told.last_discovered_at),
        lastComplete=_iso(told.last_complete_at),
        lagSeconds=told.lag_seconds,
        watermark=told.watermark,
        conversations=told.conversation_count,
        rows=told.row_count,
        skipped=dict(told.skipped),
        lastSessions=told.last_session_count,
        lastRows=told.last_rows,
        lastSeconds=told.last_seconds,
        consecutiveFailures=told.consecutive_failures,
        error=failure,
        lastReconcile=_iso(told.reconciled_at),
        drift=told.drift,
    )


def _iso(moment: datetime | None) -> str | None:
    return None if moment is None else time_of(moment)
