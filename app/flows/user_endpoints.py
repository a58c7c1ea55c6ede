"""DELETE /api/users/{user_id}: everything of a user goes."""

from typing import Any, Literal, TypedDict

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from app.access.audit import Actor
from app.access.guard import owner_of, principal_of
from app.answers import private_json
from app.errors import NotFound
from app.flows.erasure import Erasure
from app.telemetry import request_id
from app.text import clean

# How long somebody waits for the end of it, in seconds; a job does the rest.
_PATIENCE_S = 10.0


class Needs(TypedDict):
    erasure: Erasure


class EraseAnswer(BaseModel):
    """Where `erased` is false, the server goes on with it by itself."""

    success: Literal[True]
    erased: bool


async def erase_user(request: Request[Needs]) -> Response:
    """Erase oneself by a token of one's own, or as an administrator anybody."""
    user_id = _whom(request)
    actor = Actor(principal_of(request).id, request_id(request.scope))
    erased = await request.state["erasure"].erase(user_id, actor, within_s=_PATIENCE_S)
    return private_json({"success": True, "erased": erased}, status=200 if erased else 202)


def _whom(request: Request[Any]) -> str:
    """Raises NotFound for anybody else than the user who asks, whether there is such a user or not."""
    user_id = clean(request.path_params["user_id"])
    if owner_of(request) == user_id or principal_of(request).may("admin"):
        return user_id
    raise NotFound("user_unknown", "There is no such user, or it is not you.")
