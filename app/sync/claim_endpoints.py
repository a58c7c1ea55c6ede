"""POST /api/chats/claim: a user who has signed in takes over what they did before as somebody anonymous."""

from typing import Annotated, Literal, TypedDict

from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.requests import Request
from starlette.responses import Response

from app.access.audit import Actor
from app.access.credentials import Credentials
from app.access.guard import principal_of, user_of
from app.access.limits import Limits
from app.answers import private_json
from app.errors import Forbidden, Invalid, Unauthorized
from app.postgres import Pool
from app.sync.changes import Changes
from app.sync.claim import Claim
from app.telemetry import request_id
from app.text import clean, parse_object, validated
from app.wall import Wall


class Needs(TypedDict):
    credentials: Credentials
    limits: Limits
    pool: Pool
    wall: Wall
    changes: Changes


class ClaimChats(BaseModel):
    """Whose chats: by a token of that user, or, for whoever acts for any user, by the user's name."""

    model_config = ConfigDict(strict=True)

    proof: Annotated[str, Field(min_length=1, max_length=8192)] | None = None
    from_user_id: Annotated[str, Field(min_length=1, max_length=256)] | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> "ClaimChats":
        if (self.proof is None) == (self.from_user_id is None):
            raise ValueError("exactly one of proof and from_user_id has to be given")
        return self


class ClaimAnswer(BaseModel):
    """What has come, or come back, with this request."""

    success: Literal[True]
    chats: int
    messages: int


async def claim_chats(request: Request[Needs]) -> Response:
    """Everything in the chats of another user becomes one's own."""
    given = validated(ClaimChats, parse_object(await request.body()))
    user_id = user_of(request)
    from_user = await _proven(request, given)
    if from_user == user_id:
        raise Invalid("invalid_request", "These chats are this user's already.")
    state = request.state
    claim = Claim(state["pool"], state["wall"], state["changes"], user_id, from_user)
    await claim.take(Actor(principal_of(request).id, request_id(request.scope)))
    return private_json({"success": True, "chats": claim.chats, "messages": claim.messages})


async def _proven(request: Request[Needs], given: ClaimChats) -> str:
    """Raises Forbidden where nothing proves that whoever asks may have them."""
    if given.from_user_id is not None:
        if principal_of(request).user_id is not None:
            raise Forbidden("proof_invalid", "A user proves it with a token of the other user, as proof.")
        return clean(given.from_user_id)
    try:
        other = await request.state["credentials"].proof(given.proof or "")
    except Unauthorized as refused:
        request.state["limits"].count_failure(request.scope)
        raise Forbidden("proof_invalid", f"The proof is not accepted: {refused.detail}") from None
    if other.user_id is None or not other.may("sync"):
        raise Forbidden("proof_invalid", "The proof is no token of a user who may synchronise chats.")
    return other.user_id
