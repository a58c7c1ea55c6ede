"""GET and PUT /api/conversation-config/{id}: what a front end may know of a chatbot, and how an admin replaces one."""

import ipaddress
from typing import Any, Literal, TypedDict

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from app.errors import Forbidden, Invalid, Misconfigured
from app.flows import chatbots
from app.flows.chatbots import Chatbots
from app.flows.config import Chatbot, Choice
from app.flows.file import File, parse_one
from app.postgres import Pool, retry_conflicts
from app.providers.registry import resolve
from app.settings import Settings
from app.text import parse_object


class Needs(TypedDict):
    chatbots: Chatbots
    pool: Pool
    settings: Settings


class FrontEndConfiguration(BaseModel):
    """What front ends need; secrets, prompts, URLs and templates stay here.

    `flowApiKeys` says of each flow whether its key can be used on this server: "configured", or "" where it has none or
    its reference leads nowhere.
    """

    chatbot_id: str
    version: int
    image_enabled: bool
    language: str
    languages: list[str]
    flows: list[str]
    answers: list[str]
    markers: list[str]
    on_busy: Literal["enqueue", "reject", "interrupt"]
    topKSettings: dict[str, int]
    flowApiKeys: dict[str, Literal["configured", ""]]
    allowed: dict[str, Any]


class ConfigurationAnswer(BaseModel):
    """A chatbot as front ends see it."""

    success: Literal[True] = True
    configuration: FrontEndConfiguration


class ReplaceConfiguration(BaseModel):
    """A chatbot in the shapes of the chatbots file, with the providers and templates that it names."""

    providers: dict[str, Any] = {}
    templates: dict[str, str] = {}
    chatbot: dict[str, Any]


class ReplaceAnswer(BaseModel):
    """Which version is in use now, within a second on every replica."""

    success: Literal[True] = True
    chatbot_id: str
    version: int
    changed: bool


async def conversation_config(request: Request[Needs]) -> Response:
    """Look at a chatbot, or replace it."""
    return await (_replace(request) if request.method == "PUT" else _show(request))


async def _show(request: Request[Needs]) -> Response:
    chatbot_id = request.path_params["chatbot_id"]
    version, chatbot = await request.state["chatbots"].newest(chatbot_id)
    answer = ConfigurationAnswer(configuration=_shown(chatbot_id, version, chatbot))
    return _json(answer.model_dump_json().encode())


def _shown(chatbot_id: str, version: int, chatbot: Chatbot) -> FrontEndConfiguration:
    allow = chatbot.allow
    return FrontEndConfiguration(
        chatbot_id=chatbot_id,
        version=version,
        image_enabled=chatbot.takes_images,
        language=chatbot.language,
        languages=list(allow.languages),
        flows=list(chatbot.flows),
        answers=list(chatbot.answers),
        markers=[marker.name for marker in chatbot.markers],
        on_busy=chatbot.on_busy,
        topKSettings={name: flow.top_k for name, flow in chatbot.flows.items() if flow.top_k is not None},
        flowApiKeys={name: _key(flow.choices[0]) for name, flow in chatbot.flows.items()},
        allowed={
            "temperature": allow.temperature,
            "topKSettings": allow.top_k,
            "values": list(allow.values),
            "flow_type": allow.flow_type,
        },
    )


def _key(choice: Choice) -> Literal["configured", ""]:
    if choice.endpoint.api_key is None:
        return ""
    try:
        return "configured" if resolve(choice.endpoint.api_key) else ""
    except Misconfigured:
        return ""


async def _replace(request: Request[Needs]) -> Response:
    admins_only(request.state["settings"])
    chatbot_id = request.path_params["chatbot_id"]
    given = parse_object(await request.body())
    try:
        file = parse_one(chatbot_id, given)
        version, changed = await retry_conflicts(lambda: _apply(request.state["pool"], chatbot_id, file))
    except Misconfigured as error:
        raise Invalid("configuration_invalid", error.detail) from None
    return _json(ReplaceAnswer(chatbot_id=chatbot_id, version=version, changed=changed).model_dump_json().encode())


async def _apply(pool: Pool, chatbot_id: str, file: File) -> tuple[int, bool]:
    async with pool.acquire() as connection:
        changes = await chatbots.apply(connection, file)
        if changes:
            return changes[0].version, True
        return await chatbots.newest_version(connection, chatbot_id), False


def admins_only(settings: Settings) -> None:
    """Until requests are authenticated: whoever can reach a server that listens on loopback alone runs it.

    Raises Forbidden on any other server.
    """
    try:
        loopback = settings.host == "localhost" or ipaddress.ip_address(settings.host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise Forbidden(
            "admin_only", "This server listens beyond its own machine; use `parley apply FILE` to change chatbots."
        )


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json", headers={"Cache-Control": "no-store"})
