"""GET /api/usage: what answers have cost a user, or all of them."""

from collections.abc import Mapping
from typing import Any, Literal, TypedDict

import asyncpg
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from app.answers import private_json
from app.chats.usage import Group, used
from app.conversations.parameters import days, one_of, whose
from app.wall import Wall

_GROUPS: tuple[Group, ...] = ("day", "model", "chatbot")


class Needs(TypedDict):
    wall: Wall


class Used(BaseModel):
    """What one day, model or chatbot adds up to; `name` says which. `calls` are of providers, each try and each side
    flow is one, and `failed` those of them that failed."""

    name: str
    calls: int
    failed: int
    promptTokens: int
    completionTokens: int
    totalTokens: int
    durationMs: int


class Usage(BaseModel):
    """The largest thousand groups, of days the last thousand; the days are those of UTC, `until` is not included."""

    group: Literal["day", "model", "chatbot"]
    since: str
    until: str
    usage: list[Used]


async def usage(request: Request[Needs]) -> Response:
    """What was used, in groups."""
    group, (since, until) = one_of(request, "group", _GROUPS), days(request)
    user_id = whose(request)
    async with request.state["wall"].connection() as connection:
        rows = await used(connection, group, since=since, until=until, user_id=user_id)
    return private_json(
        {
            "group": group,
            "since": since.isoformat(),
            "until": until.isoformat(),
            "usage": [_used(row) for row in rows],
        }
    )


def _used(row: asyncpg.Record) -> Mapping[str, Any]:
    return {
        "name": str(row["name"]),
        "calls": row["calls"],
        "failed": row["failed"],
        "promptTokens": row["prompt_tokens"],
        "completionTokens": row["completion_tokens"],
        "totalTokens": row["prompt_tokens"] + row["completion_tokens"],
        "durationMs": row["duration_ms"],
    }
