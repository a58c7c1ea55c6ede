"""A user's chats as files: what is exported, and what is imported."""

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any, Literal, TypedDict

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from app.access.guard import principal_of, user_of
from app.answers import private_json
from app.chats.allowance import Allowance, Shares, shares_of
from app.chats.chat import MessageStatus, Role
from app.conversations.parameters import one_of
from app.download import Download
from app.settings import Settings
from app.sync.changes import Changes
from app.sync.chat_endpoints import chat_of
from app.sync.export import Export, Format
from app.sync.imports.importing import Import
from app.wall import Wall

_FILES: Mapping[Format, tuple[str, str]] = {
    "json": ("json", "application/json"),
    "markdown": ("md", "text/markdown"),
}


class Needs(TypedDict):
    wall: Wall
    settings: Settings
    # Files that are made at once, each over a connection of its own.
    exports: Allowance
    # Files that are read at once.
    imports: Allowance
    changes: Changes


class ExportedMessage(BaseModel):
    """A message of a file. What is not said has its default."""

    id: str
    role: Role
    content: str
    timestamp: str
    parentId: str | None = None
    status: MessageStatus = "complete"
    attachments: list[dict[str, Any]] = []


class ExportedChat(BaseModel):
    """A chat of a file, with its messages in their order."""

    id: str
    title: str
    createdAt: str
    parentChatId: str | None
    branchFromMessageId: str | None
    messages: list[ExportedMessage]


class ExportedChats(BaseModel):
    """A file of chats, as an import takes it."""

    format: Literal["parley"]
    version: Literal[1]
    exportedAt: str
    chats: list[ExportedChat]


class Added(BaseModel):
    """What was not there before, or has come back."""

    chats: int
    messages: int


class FailedConversation(BaseModel):
    """A conversation of the file, by its number there, that could not be read."""

    number: int
    title: str
    reason: str


class ImportAnswer(BaseModel):
    """What the file had and what of it is new here. `leftOut`: messages of other branches, instructions, tools.

    Of `failures` conversations that could not be read a hundred are named at most.
    """

    success: Literal[True]
    formats: list[Literal["parley", "chatgpt", "open_webui"]]
    chats: int
    messages: int
    added: Added
    leftOut: int
    failures: int
    failed: list[FailedConversation]


async def import_chats(request: Request[Needs]) -> Response:
    """Chats from a file, as the body."""
    user_id = user_of(request)
    file = Import(request.state["changes"], user_id)
    async with request.state["imports"].take(**shares_of(principal_of(request), user_id)):
        await file.read(request.stream())
    return private_json(
        {
            "success": True,
            "formats": sorted(file.formats),
            "chats": file.chats,
            "messages": file.messages,
            "added": {"chats": file.chats_added, "messages": file.messages_added},
            "leftOut": file.left_out,
            "failures": file.failures,
            "failed": file.failed,
        }
    )


async def export_chat(request: Request[Needs]) -> Response:
    """One chat as a file."""
    return _download(request, user_of(request), chat_of(request), name="chat")


async def export_all(request: Request[Needs]) -> Response:
    """All chats of a user as a file."""
    return _download(request, user_of(request), None, name="chats")


def _download(request: Request[Needs], user_id: str, chat_id: str | None, *, name: str) -> Response:
    written = one_of(request, "format", list(_FILES))
    export = Export(request.state["wall"], user_id, chat_id, written)
    ending, media_type = _FILES[written]
    return Download(
        _one_of_few(request.state["exports"], export.parts(), shares_of(principal_of(request), user_id)),
        name=f"{name}.{ending}",
        media_type=media_type,
        send_timeout_s=request.state["settings"].sse_send_timeout_s,
    )


async def _one_of_few(
    exports: Allowance, parts: AsyncGenerator[bytes, None], shares: Shares
) -> AsyncGenerator[bytes, None]:
    async with exports.take(**shares), aclosing(parts):
        async for part in parts:
            yield part
