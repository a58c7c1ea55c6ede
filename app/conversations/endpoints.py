"""Listing conversations, reading one, and what they add up to: validation at the edge."""

from collections.abc import Mapping
from math import ceil
from typing import Any, Literal, TypedDict

import asyncpg
import orjson
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from app.access.guard import principal_of
from app.answers import private_json, time_of
from app.chats.allowance import Allowance, shares_of
from app.conversations import listing, message_search, message_words, transcript
from app.conversations.foreign_transcript import find_source, foreign_messages
from app.conversations.index import OWN
from app.conversations.listing import FAR
from app.conversations.pages import Place, Wanted, place
from app.conversations.parameters import days, moment, one_of, whole_number, whose, word
from app.conversations.sources.shape import Message
from app.conversations.statistics import Group, statistics
from app.conversations.transcript import Named
from app.errors import BadRequest
from app.postgres import Pool
from app.settings import Settings
from app.text import clean
from app.wall import Wall

_SIZE, _LARGEST = 50, 200
_ORDERS = {"-lastMessageTime": True, "lastMessageTime": False}
_GROUPS: tuple[Group, ...] = ("day", "model", "user", "chatbot")


class Needs(TypedDict):
    wall: Wall
    pool: Pool
    settings: Settings
    # Conversations that are read from other programs' databases at once, each over a connection of its own.
    readings: Allowance


class Match(BaseModel):
    """The newest message of a conversation that has the words, and what stands around the first of them."""

    messageId: str
    role: Literal["user", "assistant", "system"]
    snippet: str


class Conversation(BaseModel):
    """An entry of the index. `messageIds` are the newest of them; questions are cut at 300 characters. `match` is there
    where all messages were searched.
    """

    conversationId: str
    source: str
    username: str
    chatbotId: str
    model: str
    clientIp: str
    firstMessageTime: str
    lastMessageTime: str
    durationSeconds: int
    messageCount: int
    totalTokens: int
    firstQuestion: str
    lastQuestion: str
    messageIds: list[str]
    createdAt: str
    updatedAt: str
    match: Match | None = None


class Conversations(BaseModel):
    """A page of the list. Where `totalIsExact` is false there are at least `total`. `nextCursor` is null at the end.
    `searchIsComplete` is there where all messages were searched: false while older ones are still being made ready.
    """

    conversations: list[Conversation]
    total: int
    totalIsExact: bool
    page: int | None
    size: int
    totalPages: int
    nextCursor: str | None
    searchIsComplete: bool | None = None


class ConversationMessage(BaseModel):
    """One utterance. A `partial` one is an answer that was stopped or broke off. Of another program's table, `id` is
    the row's, and tools and instructions are `other`.
    """

    id: str
    role: Literal["user", "assistant", "system", "other"]
    content: str
    status: Literal["complete", "partial", "failed"]
    attachments: list[dict[str, Any]]
    timestamp: str | None


class Transcript(BaseModel):
    """Messages of a conversation in their order; `messageCount` counts all of them."""

    conversationId: str
    source: str
    username: str
    messages: list[ConversationMessage]
    messageCount: int
    nextCursor: str | None


class Figures(BaseModel):
    """What one day, model, user or chatbot adds up to; `name` says which. A question counts where it is
    answered, when its answer ends."""

    name: str
    messages: int
    questions: int
    tokens: int
    durationMs: int


class Statistics(BaseModel):
    """The largest thousand groups, of days the last thousand; the days are those of UTC, `until` is not included."""

    group: Literal["day", "model", "user", "chatbot"]
    since: str
    until: str
    statistics: list[Figures]


async def conversations(request: Request[Needs]) -> Response:
    """A page of the index, by number or by cursor."""
    wanted, size = _wanted(request), whole_number(request, "size", _SIZE, most=_LARGEST)
    after, number = _where(request, wanted, size)
    skip = 0 if after else (number - 1) * size
    in_messages = _in_messages(request, wanted)
    find, more = (message_search.page if in_messages else listing.page), {}
    async with request.state["wall"].connection() as connection:
        page = await find(connection, wanted, size=size, after=after, skip=skip)
        if in_messages:
            more = {"searchIsComplete": await message_words.is_complete(connection)}
    cursor = page.behind.told(newest_first=wanted.newest_first) if page.behind else None
    return private_json(
        {
            "conversations": [_entry(row) for row in page.rows],
            "total": page.total.count,
            "totalIsExact": page.total.exact,
            "page": None if after else number,
            "size": size,
            "totalPages": ceil(page.total.count / size),
            "nextCursor": cursor,
            **more,
        }
    )


def _in_messages(request: Request[Needs], wanted: Wanted) -> bool:
    """Whether `q` is looked for in all messages. Raises BadRequest where that is turned off, or cannot be."""
    if one_of(request, "in", ("questions", "messages")) == "questions" or wanted.query is None:
        return False
    if not request.state["settings"].search_messages:
        detail = "Messages are not searched here, only first and last questions: PARLEY_SEARCH_MESSAGES turns it on."
        raise BadRequest("search_off", detail)
    if wanted.source not in (None, OWN):
        raise BadRequest("bad_parameter", f"in=messages searches our own chats only, source={OWN}; leave one out.")
    return True


def _where(request: Request[Needs], wanted: Wanted, size: int) -> tuple[Place | None, int]:
    """Behind which conversation, or else which page."""
    cursor, number = word(request, "cursor"), whole_number(request, "page", 1)
    if cursor is not None:
        return place(cursor, newest_first=wanted.newest_first), number
    if (number - 1) * size > FAR:
        detail = f"Pages are turned by number up to the {FAR}th conversation; go on with nextCursor as cursor."
        raise BadRequest("page_too_deep", detail)
    return None, number


def _wanted(request: Request[Needs]) -> Wanted:
    return Wanted(
        username=whose(request),
        model=word(request, "model"),
        chatbot_id=word(request, "chatbot_id"),
        source=word(request, "source"),
        query=word(request, "q"),
        since=moment(request, "from"),
        until=moment(request, "to"),
        newest_first=_ORDERS[one_of(request, "sort", list(_ORDERS))],
    )


def _entry(row: asyncpg.Record) -> Mapping[str, Any]:
    return {
        "conversationId": row["conversation_id"],
        "source": row["source"],
        "username": row["username"],
        "chatbotId": row["chatbot_id"],
        "model": row["model"],
        "clientIp": row["client_ip"],
        "firstMessageTime": time_of(row["first_message_at"]),
        "lastMessageTime": time_of(row["last_message_at"]),
        "durationSeconds": round((row["last_message_at"] - row["first_message_at"]).total_seconds()),
        "messageCount": row["message_count"],
        "totalTokens": row["total_tokens"],
        "firstQuestion": row["first_question"],
        "lastQuestion": row["last_question"],
        "messageIds": row["message_ids"],
        "createdAt": time_of(row["created_at"]),
        "updatedAt": time_of(row["updated_at"]),
        **({"match": _match(row)} if "match_id" in row else {}),
    }


def _match(row: asyncpg.Record) -> Mapping[str, Any]:
    return {"messageId": row["match_id"], "role": row["match_role"], "snippet": row["snippet"]}


async def conversation(request: Request[Needs]) -> Response:
    """One conversation with a page of its messages."""
    named_id = clean(request.path_params["conversation_id"])
    username, source = whose(request), word(request, "source")
    size, after = whole_number(request, "size", _SIZE, most=_LARGEST), whole_number(request, "cursor", 0, least=0)
    async with request.state["wall"].connection() as connection:
        await listing.require_index(connection)
        named = await transcript.find(connection, named_id, username=username, source=source)
        if named.is_own:
            page = await transcript.own_messages(connection, named, after=after, size=size)
            return _transcript(named, [_message(row) for row in page.rows], page.behind)
    async with request.state["readings"].take(**shares_of(principal_of(request))):
        told = await foreign_messages(
            await find_source(request.state["pool"], named.source), named, after=after, size=size
        )
    return _transcript(named, [_foreign(key, message) for key, message in told.messages], told.behind)


def _transcript(named: Named, messages: list[Mapping[str, Any]], behind: int | None) -> Response:
    return private_json(
        {
            "conversationId": named.id,
            "source": named.source,
            "username": named.username,
            "messages": messages,
            "messageCount": named.messages,
            "nextCursor": None if behind is None else str(behind),
        }
    )


def _foreign(key: str, message: Message) -> Mapping[str, Any]:
    return {
        "id": key,
        "role": message.role,
        "content": message.text,
        "status": "complete",
        "attachments": [],
        "timestamp": None if message.at is None else time_of(message.at),
    }


def _message(row: asyncpg.Record) -> Mapping[str, Any]:
    return {
        "id": row["id"],
        "role": row["role"],
        "content": row["content"],
        "status": row["status"],
        "attachments": orjson.Fragment(row["attachments"]),
        "timestamp": time_of(row["created_at"]),
    }


async def message_statistics(request: Request[Needs]) -> Response:
    """What messages add up to, in groups."""
    group, (since, until) = one_of(request, "group", _GROUPS), days(request)
    username, source = whose(request), word(request, "source")
    async with request.state["wall"].connection() as connection:
        rows = await statistics(connection, group, since=since, until=until, username=username, source=source)
    return private_json(
        {
            "group": group,
            "since": since.isoformat(),
            "until": until.isoformat(),
            "statistics": [_figures(row) for row in rows],
        }
    )


def _figures(row: asyncpg.Record) -> Mapping[str, Any]:
    return {
        "name": str(row["name"]),
        "messages": row["messages"],
        "questions": row["questions"],
        "tokens": row["tokens"],
        "durationMs": row["duration_ms"],
    }
