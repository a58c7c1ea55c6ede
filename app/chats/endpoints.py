"""POST /api/upload-image: a picture is checked and stored, and where a question comes with it, a flow looks at it."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypedDict
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from app.access.guard import acting_for, principal_of
from app.access.limits import Limits
from app.access.links import Links
from app.access.principal import Principal
from app.chats.allowance import Allowance, shares_of
from app.chats.images import Images, StoredImage
from app.chats.uploads import ImageData, upload_of
from app.errors import BadRequest, Invalid
from app.settings import Settings
from app.telemetry import request_id
from app.text import clean, parse_object, validated

Name = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f\x7f\ufffd]+$")]

# An upload is one long text and little around it. Without this bound, ten megabytes of "[],[],[]" would be parsed into
# hundreds of megabytes of lists.
_MOST_PARTS = 50_000


class UploadImage(BaseModel):
    """A picture for a chatbot, with or without a question about it."""

    model_config = ConfigDict(strict=True)

    chatbot_id: Name
    image_data: ImageData
    message_text: str | None = None
    configuration: dict[str, Any] | None = None
    user_id: Name | None = None


class ImageAnswer(BaseModel):
    """The picture as it was stored: scaled down where it was large, upright, without metadata."""

    id: str
    mime: str
    width: int
    height: int
    bytes: int
    sha256: str


class UploadAnswer(BaseModel):
    """`id` is what a message names as its `image_id`."""

    success: Literal[True] = True
    image: ImageAnswer
    analysis: str | None = None
    streaming_session_id: str | None = None
    streaming_url: str | None = None


@dataclass(frozen=True, slots=True)
class Question:
    """What somebody asks about a picture they uploaded."""

    image: StoredImage
    chatbot_id: str
    text: str
    configuration: dict[str, Any]
    user_id: str | None
    request_id: str | None
    principal: Principal


@dataclass(frozen=True, slots=True)
class Analysis:
    """What became of a question: the text where it is there already, or where it streams."""

    text: str | None = None
    streaming_session_id: str | None = None


class Needs(TypedDict):
    settings: Settings
    links: Links
    limits: Limits
    images: Images
    uploads: Allowance
    # Raises Unavailable where nothing may be stored now.
    admit_upload: Callable[[], None]
    # Raises TooMany where this user may not ask this chatbot anything more now.
    admit_question: Callable[[str, str, Principal], Awaitable[None]]
    # The chatbot's image flow. None: a question is not answered.
    analyse: Callable[[Question], Awaitable[Analysis]] | None


async def upload_image(request: Request[Needs]) -> Response:
    """Check and store a picture; the same one again is stored once."""
    request.state["admit_upload"]()
    # Before the body is read: what waits here waits at its sender.
    principal = principal_of(request)
    async with request.state["uploads"].take(_size(request), **shares_of(principal)):
        upload = await _received(request)
        user_id = acting_for(request, upload.user_id)
        request.state["limits"].count_named(request.scope, "uploads", user_id)
        if upload.message_text:
            request.state["limits"].count_as_well(request.scope, "messages", user_id)
            await request.state["admit_question"](user_id or "", upload.chatbot_id, principal)
        image = await request.state["images"].accept(upload_of(upload.image_data), user_id=user_id or "")
    analysis = await _analysis(request, upload, image, user_id=user_id)
    answer = UploadAnswer(
        image=ImageAnswer(
            id=str(image.id),
            mime=image.mime,
            width=image.width,
            height=image.height,
            bytes=image.bytes,
            sha256=image.sha256,
        ),
        analysis=analysis.text,
        streaming_session_id=analysis.streaming_session_id,
        streaming_url=_url(request.state["links"], analysis),
    )
    return Response(answer.model_dump_json(), media_type="application/json")


def _url(links: Links, analysis: Analysis) -> str | None:
    return links.url(UUID(analysis.streaming_session_id)) if analysis.streaming_session_id else None


def _size(request: Request[Needs]) -> int:
    declared, limit = request.headers.get("content-length", ""), request.state["settings"].upload_limit
    return min(int(declared), limit) if declared.isdecimal() else limit


async def _received(request: Request[Needs]) -> UploadImage:
    settings = request.state["settings"]
    upload = validated(UploadImage, parse_object(await _body(request)))
    if len((upload.message_text or "").encode(errors="replace")) > settings.message_limit:
        raise Invalid("message_too_long", f"message_text is longer than {settings.message_limit} bytes.")
    return upload


async def _body(request: Request[Needs]) -> bytearray:
    # Not request.body(), which keeps ten megabytes for as long as the request lives.
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
    if sum(map(body.count, (b",", b"[", b"{"))) > _MOST_PARTS:
        raise BadRequest("invalid_json", "The body has too many members for an upload.")
    return body


async def _analysis(
    request: Request[Needs], upload: UploadImage, image: StoredImage, *, user_id: str | None
) -> Analysis:
    analyse = request.state["analyse"]
    if analyse is None or not upload.message_text:
        return Analysis()
    question = Question(
        image=image,
        chatbot_id=upload.chatbot_id,
        text=clean(upload.message_text),
        configuration=upload.configuration or {},
        user_id=user_id,
        request_id=request_id(request.scope),
        principal=principal_of(request),
    )
    return await analyse(question)
