"""Chats for front ends that do not synchronise: validation at the edge, and chats as they are listed."""

from collections.abc import Mapping
from typing import Annotated, Any, TypedDict
from uuid import uuid4

import asyncpg
import orjson
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from app.access.guard import user_of
from app.answers import private_json, time_of
from app.chats.chat import MessageStatus, Role
from app.conversations.parameters import one_of, whole_number, word
from app.sync import chats, edits
from app.sync.changes import Changes
from app.sync.chats import Place
from app.text import clean, parse_object, validated
from app.wall import Wall

# Of a body, in bytes.
BODY_LIMIT = 64 << 10
_SIZE, _LARGEST = 50, 200
_ORDERS = {"position": False, "-position": True}

Id = Annotated[str, Field(pattern=r"^[A-Za-z0-9._~:-]{1,128}$")]
Title = Annotated[str, Field(min_length=1, max_length=500)]


class Needs(TypedDict):
    wall: Wall
    changes: Changes


class ChatEntry(BaseModel):
    """A chat. Times are those of its first and its last message; the preview has 200 characters of the last one.

    `branches` are the ids of chats that branch off from it, a hundred at most. Tokens are those of answers made here.
    """

    id: str
    title: str
    messageCount: int
    totalTokens: int
    lastMessagePreview: str
    createdAt: str
    updatedAt: str
    parentChatId: str | None
    branchFromMessageId: str | None
    branches: list[str]


class ChatList(BaseModel):
    """A page of a user's chats; `nextCursor` is null at the end."""

    chats: list[ChatEntry]
    nextCursor: str | None


class ChatMessage(BaseModel):
    """A `partial` one is an answer that was stopped or broke off."""

    id: str
    role: Role
    content: str
    status: MessageStatus
    attachments: list[dict[str, Any]]
    parentId: str | None
    timestamp: str


class ChatMessages(BaseModel):
    """A page of a chat's messages; `nextCursor` is null at the end."""

    chatId: str
    messages: list[ChatMessage]
    nextCursor: str | None


class RenameChat(BaseModel):
    """Call a chat something else."""

    model_config = ConfigDict(strict=True)

    title: Title


class BranchChat(BaseModel):
    """Go on from one of a chat's messages in a chat of its own. `id`: what that is to be called, to be repeatable."""

    model_config = ConfigDict(strict=True)

    message_id: Id
    id: Id | None = None
    title: Title | None = None


class ChatDeleted(BaseModel):
    success: bool
    id: str


async def listed(request: Request[Needs]) -> Response:
    """A page of a user's chats."""
    user_id, size = user_of(request), whole_number(request, "size", _SIZE, most=_LARGEST)
    cursor = word(request, "cursor")
    async with request.state["wall"].connection() as connection:
        page = await chats.page(connection, user_id, after=chats.place(cursor) if cursor else Place(), size=size)
    behind = None if page.behind is None else str(page.behind)
    return private_json({"chats": [_entry(row) for row in page.rows], "nextCursor": behind})


async def chat(request: Request[Needs]) -> Response:
    """One chat: read, renamed or deleted."""
    match request.method:
        case "PATCH":
            return await _rename(request)
        case "DELETE":
            return await _delete(request)
        case _:
            return await _told(request, user_of(request), chat_of(request))


async def _rename(request: Request[Needs]) -> Response:
    given = validated(RenameChat, parse_object(await request.body()))
    user_id, chat_id = await _known(request)
    await edits.rename(request.state["changes"], user_id, chat_id, clean(given.title))
    return await _told(request, user_id, chat_id)


async def _delete(request: Request[Needs]) -> Response:
    user_id, chat_id = await _known(request)
    await edits.delete(request.state["changes"], user_id, chat_id)
    return private_json({"success": True, "id": chat_id})


async def messages(request: Request[Needs]) -> Response:
    """A page of a chat's messages, from either end."""
    user_id, chat_id, backward = user_of(request), chat_of(request), _backward(request)
    size, failed = whole_number(request, "size", _SIZE, most=_LARGEST), word(request, "failed") == "true"
    after = whole_number(request, "cursor", 0, least=0) if word(request, "cursor") else None
    async with request.state["wall"].connection() as connection:
        await chats.require(connection, user_id, chat_id)
        page = await chats.messages(
            connection, user_id, chat_id, size=size, after=after, backward=backward, failed=failed
        )
    cursor = None if page.behind is None else str(page.behind)
    return private_json({"chatId": chat_id, "messages": [_message(row) for row in page.rows], "nextCursor": cursor})


def _backward(request: Request[Needs]) -> bool:
    return _ORDERS[one_of(request, "sort", list(_ORDERS))]


async def branch(request: Request[Needs]) -> Response:
    """A copy of a chat up to one of its messages."""
    given = validated(BranchChat, parse_object(await request.body()))
    user_id, chat_id = await _known(request)
    name, title = given.id or str(uuid4()), None if given.title is None else clean(given.title)
    changes = request.state["changes"]
    await edits.Branch(changes, user_id, chat_id, message_id=given.message_id, id=name, title=title).make()
    return await _told(request, user_id, name)


async def _told(request: Request[Needs], user_id: str, chat_id: str) -> Response:
    async with request.state["wall"].connection() as connection:
        return private_json(_entry(await chats.entry(connection, user_id, chat_id)))


async def _known(request: Request[Needs]) -> tuple[str, str]:
    """Whose chat, and which: where there is none, nothing is locked for it."""
    user_id, chat_id = user_of(request), chat_of(request)
    async with request.state["wall"].connection() as connection:
        await chats.require(connection, user_id, chat_id)
    return user_id, chat_id


def chat_of(request: Request[Any]) -> str:
    """The chat that the path names."""
    return clean(request.path_params["chat_id"])


def _entry(row: asyncpg.Record) -> Mapping[str, Any]:
    return {
        "id": row["chat_id"],
        "title": row["title"],
        "messageCount": row["message_count"],
        "totalTokens": row["total_tokens"],
        "lastMessagePreview": row["preview"],
        "createdAt": time_of(row["created_at"]),
        "updatedAt": time_of(row["updated_at"]),
        "parentChatId": row["parent_chat_id"],
        "branchFromMessageId": row["branch_from_message_id"],
        "branches": row["branches"],
    }


def _message(row: asyncpg.Record) -> Mapping[str, Any]:
    return {
        "id": row["id"],
        "role": row["role"],
        "content": row["content"],
        "status": row["status"],
        "attachments": orjson.Fragment(row["attachments"]),
        "parentId": row["parent_id"],
        "timestamp": time_of(row["timestamp"]),
    }
