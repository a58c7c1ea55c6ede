"""Whole histories at the edge: what front ends without a cursor send, and what they read."""

from asyncio import sleep
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, TypedDict

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from starlette.requests import Request
from starlette.responses import Response

from app.access.guard import principal_of
from app.access.links import Links
from app.answers import private_json, time_of
from app.chats.allowance import Allowance, shares_of
from app.chats.chat import LONGEST
from app.download import Download
from app.errors import BadRequest, TooLarge
from app.settings import Settings
from app.sync.changes import Changes
from app.sync.figures import Figures
from app.sync.history import Conversation, Histories, now_of
from app.sync.merge import LEAST, AddMessage, behind, stamp_at
from app.text import clean, stored_size
from app.wall import Wall

# A body up to here is read by anybody; of larger ones so many at once are in memory as there are of `histories`.
SMALL = 1 << 20
# Of a body: conversations, and messages of all of them.
_MOST_CONVERSATIONS, _MOST_MESSAGES = 10_000, 20_000
# The end of the year 9999.
_LAST_MS = 253_402_300_799_999

Id = Annotated[str, Field(pattern=r"^[A-Za-z0-9._~:-]{1,128}$")]


class Needs(TypedDict):
    changes: Changes
    settings: Settings
    wall: Wall
    figures: Figures
    links: Links
    # Large bodies that are in memory at once.
    histories: Allowance


def _ms(given: Any) -> int:
    """Milliseconds since 1970 of a time in ISO 8601, or of such a number. Raises ValueError."""
    if isinstance(given, str):
        moment = datetime.fromisoformat(given)
        given = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given <= _LAST_MS:
        raise ValueError("a time in ISO 8601, or milliseconds since 1970, up to the year 9999")
    return round(given)


def _bounded(text: str) -> str:
    if stored_size(text) > LONGEST:
        raise ValueError(f"at most {LONGEST} bytes")
    return text


Time = Annotated[int, BeforeValidator(_ms, json_schema_input_type=str)]


class HistoryMessage(BaseModel):
    """A message; with `error` it failed, and is left out unless `includeFailed` is said."""

    model_config = ConfigDict(strict=True)

    id: Id
    role: Literal["user", "assistant"]
    content: Annotated[str, AfterValidator(_bounded)]
    timestamp: Time
    error: bool | None = None


class HistoryConversation(BaseModel):
    """A conversation with its messages in their order. The title of the later `updatedAt` is the chat's."""

    model_config = ConfigDict(strict=True)

    id: Id
    title: str = Field(default="", max_length=500)
    createdAt: Time | None = None
    updatedAt: Time | None = None
    messages: list[HistoryMessage] = []


class SyncHistory(BaseModel):
    """Everything that a front end has, or what it takes for new; what is left out is not deleted by that."""

    model_config = ConfigDict(strict=True)

    conversations: list[HistoryConversation] = Field(max_length=_MOST_CONVERSATIONS)
    incremental: bool | None = None
    since: str | None = Field(default=None, max_length=64)
    includeFailed: bool = False
    user_id: str | None = Field(default=None, min_length=1, max_length=256)

    @model_validator(mode="after")
    def _bounded(self) -> "SyncHistory":
        if sum(len(one.messages) for one in self.conversations) > _MOST_MESSAGES:
            raise ValueError(f"at most {_MOST_MESSAGES} messages in a body")
        return self


class HistoryTaken(BaseModel):
    """How many conversations and messages were compared with what is stored, and how many failed ones left out."""

    success: Literal[True]
    syncedAt: str
    conversations: int
    messages: int
    skippedFailed: int


class ToldMessage(BaseModel):
    id: str
    role: str
    content: str
    timestamp: str


class ToldConversation(BaseModel):
    id: str
    title: str
    createdAt: str
    updatedAt: str
    messages: list[ToldMessage]


class HistoryTold(BaseModel):
    """Whole chats; `deleted` are the ids of those that were deleted since."""

    conversations: list[ToldConversation]
    deleted: list[str]
    syncedAt: str


@asynccontextmanager
async def body_of(request: Request[Needs]) -> AsyncGenerator[bytes, None]:
    """The body. A large one is one of few in memory, and has to be a history: exchanges are small."""
    async with AsyncExitStack() as stack:
        body = bytearray()
        async for chunk in request.stream():
            if len(body) <= SMALL < len(body) + len(chunk):
                await stack.enter_async_context(request.state["histories"].take(**shares_of(principal_of(request))))
            body += chunk
        if len(body) > SMALL and b'"conversations"' not in body:
            raise TooLarge("body_too_large", f"The request body is larger than {SMALL} bytes.")
        yield bytes(body)


async def take(request: Request[Needs], given: SyncHistory, user_id: str) -> Response:
    """Compare, and merge what is new."""
    conversations = []
    for one in given.conversations:
        conversations.append(_conversation(one, failed=given.includeFailed))
        await sleep(0)  # others' tokens do not wait for all of it
    histories = Histories(request.state["changes"], request.state["wall"], user_id)
    await histories.take(conversations, failed=given.includeFailed)
    taken = sum(len(one.messages) for one in conversations)
    told = {
        "success": True,
        "syncedAt": time_of(await now_of(request.state["wall"])),
        "conversations": len(conversations),
        "messages": taken,
        "skippedFailed": sum(len(one.messages) for one in given.conversations) - taken,
    }
    return private_json(told)


def tell(request: Request[Needs], user_id: str, since: str) -> Response:
    """What has changed since then; of everything, where it is empty."""
    try:
        moment = datetime.fromtimestamp(_ms(since) / 1000, UTC) if since else None
    except ValueError:
        raise BadRequest("bad_parameter", "since is no time in ISO 8601.") from None
    histories = Histories(request.state["changes"], request.state["wall"], user_id)
    response = Download(
        histories.parts(moment),
        name="conversations.json",
        media_type="application/json",
        send_timeout_s=request.state["settings"].sse_send_timeout_s,
    )
    del response.headers["content-disposition"]
    return response


def _conversation(given: HistoryConversation, *, failed: bool) -> Conversation:
    said = [message for message in given.messages if failed or not message.error]
    last = max((message.timestamp for message in given.messages), default=given.createdAt)
    at = last if given.updatedAt is None else given.updatedAt
    stamp = LEAST if at is None else stamp_at(at)
    return Conversation(given.id, clean(given.title), stamp, _messages(given.id, said))


def _messages(chat_id: str, given: Sequence[HistoryMessage]) -> list[AddMessage]:
    """With stamps that keep their order, whatever their times say."""
    messages, stamp = [], LEAST
    for one in given:
        stamp = max(stamp_at(one.timestamp), behind(stamp))
        status: Mapping[str, Any] = {"status": "failed"} if one.error else {}
        messages.append(AddMessage(one.id, chat_id, one.role, clean(one.content), stamp, **status))
    return messages
