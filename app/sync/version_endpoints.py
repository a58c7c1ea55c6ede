"""Versions of chats: listed, and brought back."""

from typing import Literal, TypedDict

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from app.access.guard import user_of
from app.answers import private_json, time_of
from app.sync import versions
from app.sync.changes import Changes
from app.sync.chat_endpoints import chat_of
from app.text import clean
from app.wall import Wall


class Needs(TypedDict):
    wall: Wall
    changes: Changes


class ChatVersion(BaseModel):
    """What a chat was before another word won. `client` is the device whose word it was, empty for the server's."""

    id: str
    title: str
    client: str
    parentChatId: str | None
    branchFromMessageId: str | None
    keptAt: str


class ChatVersions(BaseModel):
    """The last 20 that were kept, the latest word first."""

    chatId: str
    versions: list[ChatVersion]


class VersionRestored(BaseModel):
    success: Literal[True]
    id: str
    title: str


async def chat_versions(request: Request[Needs]) -> Response:
    """What lost, of one chat."""
    user_id, chat_id = user_of(request), chat_of(request)
    async with request.state["wall"].connection() as connection:
        rows = await versions.versions(connection, user_id, chat_id)
    kept = [
        {
            "id": f"{row['stamp']}.{row['client']}",
            "title": row["title"],
            "client": row["client"],
            "parentChatId": row["parent_chat_id"],
            "branchFromMessageId": row["branch_from_message_id"],
            "keptAt": time_of(row["created_at"]),
        }
        for row in rows
    ]
    return private_json({"chatId": chat_id, "versions": kept})


async def restore_version(request: Request[Needs]) -> Response:
    """One of them is the chat's again, on all devices."""
    user_id, chat_id = user_of(request), chat_of(request)
    stamp, _, client = clean(request.path_params["version"]).partition(".")
    async with request.state["wall"].connection() as connection:
        await versions.versions(connection, user_id, chat_id)  # nothing is locked for a chat that is not there
    title = await versions.restore(request.state["changes"], user_id, chat_id, stamp, client)
    return private_json({"success": True, "id": chat_id, "title": title})
