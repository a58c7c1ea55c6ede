"""The older surface of the synchronisation: a direction, and a status that the server keeps for the device."""

from typing import Any, Literal

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from app.access.guard import user_of
from app.answers import private_json, time_of
from app.sync import cursor, endpoints
from app.sync.endpoints import Exchanged, Id, SyncAnswer, mutation_of, named_by, require_enabled, told_of
from app.sync.exchange import Answer, Asked
from app.sync.figures import Exchange
from app.sync.status import status
from app.text import parse_object, validated

_DONE = {
    "full": "What was new has gone both ways.",
    "upload": "What was new has gone up.",
    "download": "What was new has come down.",
}


class Needs(endpoints.Needs):
    pass


class SyncNow(Exchanged):
    """An exchange in one direction or both. Without `device_id` it is the server's `DEVICE_ID`."""

    direction: Literal["full", "upload", "download"]
    device_id: Id | None = None


class SyncStatus(BaseModel):
    """Of one device. `pendingChanges` counts chats and messages up to 10,000 each that it was not told of.

    `cursor` is what it has shown to have read, after an exchange what it may send next.
    """

    lastSyncTimestamp: str | None
    pendingChanges: int
    isOnline: Literal[True]
    deviceId: str
    serverTime: str
    cursor: str | None


class SyncDone(BaseModel):
    """What the exchange answers, and how the device is now."""

    message: str
    status: SyncStatus
    result: SyncAnswer


async def device_sync(request: Request[Needs]) -> Response:
    """How a device is, or an exchange of it."""
    require_enabled(request.state["settings"])
    if request.method in ("GET", "HEAD"):
        return await _status(request)
    with request.state["figures"].exchange() as one:
        return await _exchange(request, one)


async def _status(request: Request[Needs]) -> Response:
    user_id, given = user_of(request), request.query_params.get("device_id")
    if given is not None:
        given = validated(_Named, {"device_id": given}).device_id
    return private_json(await _of(request, user_id, given or request.state["settings"].device_id))


class _Named(BaseModel):
    device_id: Id


async def _exchange(request: Request[Needs], one: Exchange) -> Response:
    body = await request.body()
    one.up, given = len(body), validated(SyncNow, parse_object(body))
    user_id = one.user_id = named_by(request, given.user_id)
    device = one.client = given.device_id or request.state["settings"].device_id
    asked = Asked(
        device,
        cursor.read(given.cursor) if given.cursor else None,
        [] if given.direction == "download" else [mutation_of(mutation) for mutation in given.push],
        given.failed,
        given.direction != "upload",
    )
    answer = one.answer = await request.state["changes"].exchange(user_id, asked)
    told, has = _reached(asked, answer)
    await request.state["changes"].note(user_id, device, told=told, has=has)
    state = await _of(request, user_id, device)
    if asked.pull:
        state["cursor"] = str(answer.cursor)
    result = told_of(answer, request.state["links"].url)
    response = private_json({"message": _DONE[given.direction], "status": state, "result": result})
    one.down = len(response.body)
    return response


def _reached(asked: Asked, answer: Answer) -> tuple[int | None, int | None]:
    """Up to where the device was told, and has shown to have it; None where this says nothing of it."""
    if not asked.pull or answer.cursor is None:
        return None, None
    has = 0 if answer.bootstrap or asked.cursor is None or asked.cursor.until else asked.cursor.seq
    return answer.cursor.seq, has


async def _of(request: Request[Needs], user_id: str, device: str) -> dict[str, Any]:
    found = await status(request.state["wall"], user_id, device)
    return {
        "lastSyncTimestamp": None if found.at is None else time_of(found.at),
        "pendingChanges": found.pending,
        "isOnline": True,
        "deviceId": device,
        "serverTime": time_of(found.now),
        "cursor": None if found.cursor is None else str(found.cursor),
    }
