"""The differential synchronisation of chats: validation at the edge, and rows as devices read them."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal
from uuid import UUID

import orjson
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.requests import Request
from starlette.responses import Response

from app.access.guard import acting_for, owner_of, principal_of
from app.answers import private_json
from app.chats.chat import MOST_ATTACHED, MessageStatus, Role
from app.errors import Forbidden, Invalid
from app.settings import Settings
from app.sync import cursor, history_endpoints, merge
from app.sync.changes import MOST_OPS
from app.sync.exchange import Answer, Asked, Mutation
from app.sync.figures import Exchange
from app.sync.history_endpoints import SyncHistory
from app.sync.merge import Chat, Message
from app.text import clean, parse_object, validated

# Of a body, in bytes; of operations in a push.
BODY_LIMIT = 1 << 20
_MOST_IN_ALL = 1_000
# What cannot be stored was replaced by it.
_REPLACED = "\ufffd"

Id = Annotated[str, Field(pattern=r"^[A-Za-z0-9._~:-]{1,128}$")]
Stamp = Annotated[str, Field(pattern="^[0-9a-f]{12}-[0-9a-f]{4}$")]


class Needs(history_endpoints.Needs):
    pass


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class PutChat(_Strict):
    """Make or change a chat. Fields that are left out are none."""

    op: Literal["chat.put"]
    id: Id
    title: str = Field(max_length=500)
    stamp: Stamp
    parent_chat_id: Id | None = None
    branch_from_message_id: Id | None = None


class DeleteChat(_Strict):
    """Delete a chat with its messages."""

    op: Literal["chat.del"]
    id: Id
    stamp: Stamp


class AddMessage(_Strict):
    """Add a message; `attachments` name what is stored elsewhere."""

    op: Literal["msg.add"]
    id: Id
    chat_id: Id
    # No instructions: what a device brings becomes part of what a model is told.
    role: Literal["user", "assistant"]
    content: str
    stamp: Stamp
    parent_id: Id | None = None
    attachments: list[dict[str, Any]] = Field(default_factory=list, max_length=100)
    status: MessageStatus = "complete"


class DeleteMessage(_Strict):
    """Delete a message, for good."""

    op: Literal["msg.del"]
    id: Id


class PushedMutation(_Strict):
    """Applied together or not at all."""

    mid: int = Field(ge=1, lt=1 << 53)
    ops: list[Annotated[PutChat | DeleteChat | AddMessage | DeleteMessage, Field(discriminator="op")]] = Field(
        max_length=MOST_OPS
    )


class Exchanged(_Strict):
    """What a device did and how far it has read. `failed`: failed messages, too."""

    cursor: str | None = Field(default=None, max_length=128)
    push: list[PushedMutation] = Field(default_factory=list, max_length=_MOST_IN_ALL)
    failed: bool = False
    user_id: str | None = Field(default=None, min_length=1, max_length=256)

    @model_validator(mode="after")
    def _in_order(self) -> "Exchanged":
        if len(self.push) < 2:
            return self
        first = self.push[0].mid
        if [mutation.mid for mutation in self.push] != list(range(first, first + len(self.push))):
            raise ValueError("the mids of a push follow on each other")
        if sum(len(mutation.ops) for mutation in self.push) > _MOST_IN_ALL:
            raise ValueError(f"at most {_MOST_IN_ALL} operations in a push")
        return self


class SyncChats(Exchanged):
    """An exchange of the device that calls itself so."""

    client: Id


class SyncedChat(BaseModel):
    """A chat as it is now. What is not said has its default."""

    id: str
    title: str
    stamp: str
    client: str = ""
    parent_chat_id: str | None = None
    branch_from_message_id: str | None = None
    is_deleted: bool = False
    is_purged: bool = False


class SyncedMessage(BaseModel):
    """A message as it is now. What is not said has its default. Their order is that of (stamp, id)."""

    id: str
    chat_id: str
    role: Role
    content: str
    stamp: str
    parent_id: str | None = None
    attachments: list[dict[str, Any]] = []
    status: MessageStatus = "complete"
    is_deleted: bool = False


class Told(BaseModel):
    """An operation that did not become what it said."""

    id: str
    status: Literal["lost", "forked", "moved"]


class MutationResult(BaseModel):
    mid: int
    ops: list[Told]


class ActiveStream(BaseModel):
    """An answer in the making, which any device can follow from its first event on; its URL is that of
    `POST /api/process-message`."""

    chat_id: str
    streaming_session_id: str
    streaming_url: str
    last_event_id: int


class SyncAnswer(BaseModel):
    """`server_time` in milliseconds since 1970. With `more`, ask again at once with the new `cursor`."""

    acked: int
    cursor: str | None
    server_time: int
    chats: list[SyncedChat]
    messages: list[SyncedMessage]
    more: bool
    bootstrap: bool = False
    resync: Literal["epoch", "ahead", "compacted"] | None = None
    results: list[MutationResult] = []
    active_streams: list[ActiveStream] = []


async def sync_chats(request: Request[Needs]) -> Response:
    """What was not pushed yet up, what was not seen yet down."""
    require_enabled(request.state["settings"])
    with request.state["figures"].exchange() as one:
        return await (_pull(request, one) if request.method in ("GET", "HEAD") else _push(request, one))


def require_enabled(settings: Settings) -> None:
    """Raises Forbidden where this server does not synchronise."""
    if not settings.sync_enabled:
        raise Forbidden("sync_disabled", "This server does not synchronise chats: SYNC_ENABLED is false.")


async def _pull(request: Request[Needs], one: Exchange) -> Response:
    given = request.query_params.get("cursor")
    one.user_id = require_named(owner_of(request))
    if (since := request.query_params.get("since")) is not None:
        return history_endpoints.tell(request, one.user_id, since)
    return await _exchange(request, one, Asked(cursor=cursor.read(given) if given else None))


async def _push(request: Request[Needs], one: Exchange) -> Response:
    async with history_endpoints.body_of(request) as body:
        one.up, told = len(body), parse_object(body)
        if "conversations" in told:
            history = validated(SyncHistory, told)
            one.user_id = named_by(request, history.user_id)
            return await history_endpoints.take(request, history, one.user_id)
    given = validated(SyncChats, told)
    one.client, one.user_id = given.client, named_by(request, given.user_id)
    return await _exchange(request, one, _asked(given))


async def _exchange(request: Request[Needs], one: Exchange, asked: Asked) -> Response:
    assert one.user_id is not None
    one.answer = await request.state["changes"].exchange(one.user_id, asked)
    response = private_json(told_of(one.answer, request.state["links"].url))
    one.down = len(response.body)
    return response


def named_by(request: Request[Any], given: str | None) -> str:
    """Whom a request is about that may name the user in its body. Raises Invalid, and as `acting_for`."""
    user_id = owner_of(request)
    named = None if given is None else clean(given)
    if user_id is None or named is not None:
        if named is not None and user_id not in (None, named, principal_of(request).user_id):
            raise Invalid("invalid_request", "user_id of the query and of the body name two users; say one of them.")
        user_id = acting_for(request, named)
    return require_named(user_id)


def require_named(user_id: str | None) -> str:
    """Raises Invalid where a request is about nobody in particular."""
    if user_id is None:
        raise Invalid("invalid_request", "user_id is missing: whose chats are they?")
    return user_id


def _asked(given: SyncChats) -> Asked:
    push = [mutation_of(mutation) for mutation in given.push]
    return Asked(given.client, cursor.read(given.cursor) if given.cursor else None, push, given.failed)


def mutation_of(given: PushedMutation) -> Mutation:
    ops = [_op(op) for op in given.ops]
    return Mutation(given.mid, ops, any(_is_altered(op) for op in ops))


def _op(given: PutChat | DeleteChat | AddMessage | DeleteMessage) -> merge.Op:
    match given:
        case PutChat():
            branch = (given.parent_chat_id, given.branch_from_message_id)
            return merge.PutChat(given.id, clean(given.title), given.stamp, *branch)
        case DeleteChat():
            return merge.DeleteChat(given.id, given.stamp)
        case AddMessage():
            return merge.AddMessage(
                given.id,
                given.chat_id,
                given.role,
                clean(given.content),
                given.stamp,
                given.parent_id,
                _attached(given),
                given.status,
            )
        case DeleteMessage():
            return merge.DeleteMessage(given.id)


def _attached(given: AddMessage) -> str:
    """Numbers may be longer than they were in the body."""
    if not given.attachments:
        return "[]"
    kept = orjson.dumps(given.attachments)
    if len(kept) > MOST_ATTACHED:
        raise Invalid("invalid_request", f"The attachments of {given.id} have more than {MOST_ATTACHED} bytes.")
    return kept.decode()


def _is_altered(op: merge.Op) -> bool:
    """Whether something in it may have been replaced, so that its device has to be told."""
    match op:
        case merge.PutChat():
            return _REPLACED in op.title
        case merge.AddMessage():
            return _REPLACED in op.content or _REPLACED in op.attachments
        case _:
            return False


def told_of(answer: Answer, url_of: Callable[[UUID], str]) -> dict[str, Any]:
    """An answer as devices read it, with the URLs of streams."""
    told: dict[str, Any] = {
        "acked": answer.acked,
        "cursor": None if answer.cursor is None else str(answer.cursor),
        "server_time": answer.server_time,
        "chats": [_chat(chat) for chat in answer.chats],
        "messages": [_message(message) for message in answer.messages],
        "more": answer.more,
    }
    told |= {"bootstrap": True} if answer.bootstrap else {}
    told |= {"resync": answer.resync} if answer.resync else {}
    told |= {"results": answer.results} if answer.results else {}
    streams = [
        {**stream, "streaming_url": url_of(UUID(stream["streaming_session_id"]))} for stream in answer.active_streams
    ]
    return told | ({"active_streams": streams} if streams else {})


def _chat(chat: Chat) -> Mapping[str, Any]:
    told = {"id": chat.id, "title": chat.title, "stamp": chat.stamp}
    rest = {
        "client": chat.client,
        "parent_chat_id": chat.parent_chat_id,
        "branch_from_message_id": chat.branch_from_message_id,
        "is_deleted": chat.is_deleted,
        "is_purged": chat.is_purged,
    }
    return told | {name: value for name, value in rest.items() if value}


def _message(message: Message) -> Mapping[str, Any]:
    told: dict[str, Any] = {name: getattr(message, name) for name in ("id", "chat_id", "role", "content", "stamp")}
    if message.parent_id:
        told["parent_id"] = message.parent_id
    if message.attachments != "[]":
        told["attachments"] = orjson.Fragment(message.attachments)
    if message.status != "complete":
        told["status"] = message.status
    if message.is_deleted:
        told["is_deleted"] = True
    return told
