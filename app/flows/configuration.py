"""GET and PUT /api/conversation-config/{id}: what a front end may know of a chatbot, and how an admin replaces one."""

import json
from hashlib import sha256
from typing import Any, Literal, TypedDict

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from app.access.audit import Actor
from app.access.guard import principal_of
from app.errors import BadRequest, Invalid, Misconfigured
from app.flows import chatbots
from app.flows.chatbots import Chatbots
from app.flows.config import Chatbot, Choice
from app.flows.export import to_file
from app.flows.file import FILE_LIMIT, File, parse_one, require_reachable
from app.postgres import ACQUIRE_S, Pool, retry_conflicts
from app.providers.reach import Reach
from app.safe import Safe
from app.settings import Settings
from app.telemetry import request_id
from app.text import clean, parse_object

# Largest body of a PUT, in bytes: as large as the chatbots file may be.
BODY_LIMIT = FILE_LIMIT


class Needs(TypedDict):
    chatbots: Chatbots
    pool: Pool
    settings: Settings
    safe: Safe


class FrontEndConfiguration(BaseModel):
    """What front ends need; secrets, prompts, URLs and templates stay here.

    `flowApiKeys` says of each flow whether its key can be used on this server: "configured", or "" where it has none or
    its reference leads nowhere, or it cannot be decrypted.
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


class ReplaceConfiguration(BaseModel):
    """A chatbot in the shapes of the chatbots file, with the providers and templates that it names."""

    providers: dict[str, Any] = {}
    templates: dict[str, str] = {}
    chatbot: dict[str, Any]


class ConfigurationAnswer(BaseModel):
    """A chatbot as front ends see it. For admins only: its `definition`, which a PUT takes back unchanged."""

    success: Literal[True] = True
    configuration: FrontEndConfiguration
    definition: ReplaceConfiguration | None = None


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
    answer = ConfigurationAnswer(configuration=_shown(chatbot_id, version, chatbot, request.state["safe"]))
    if principal_of(request).may("admin"):
        answer.definition = await _definition(request.state["pool"], chatbot_id, chatbot)
    body = answer.model_dump_json(exclude=None if answer.definition else {"definition"}).encode()
    # Not the version alone: another server may lack a key, and a key may come and go while the version stays.
    etag = f'"{version}-{sha256(body).hexdigest()[:16]}"'
    headers = {"ETag": etag, "Cache-Control": "private, no-cache", "Vary": "Authorization, X-API-Key"}
    if etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(body, media_type="application/json", headers=headers)


def _shown(chatbot_id: str, version: int, chatbot: Chatbot, safe: Safe) -> FrontEndConfiguration:
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
        flowApiKeys={name: _key(flow.choices[0], safe) for name, flow in chatbot.flows.items()},
        allowed={
            "temperature": allow.temperature,
            "topKSettings": allow.top_k,
            "values": list(allow.values),
            "flow_type": allow.flow_type,
        },
    )


async def _definition(pool: Pool, chatbot_id: str, chatbot: Chatbot) -> ReplaceConfiguration:
    """As in the chatbots file: keys are references in it, or encrypted."""
    async with pool.acquire(timeout=ACQUIRE_S) as connection:
        file = to_file({chatbot_id: chatbot}, newest=await chatbots.newest_templates(connection))
    return ReplaceConfiguration(
        providers=file["providers"], templates=file.get("templates", {}), chatbot=file["chatbots"][chatbot_id]
    )


def _key(choice: Choice, safe: Safe) -> Literal["configured", ""]:
    if choice.endpoint.api_key is None:
        return ""
    try:
        return "configured" if safe.resolve(choice.endpoint.api_key) else ""
    except Misconfigured:
        return ""


async def _replace(request: Request[Needs]) -> Response:
    chatbot_id = request.path_params["chatbot_id"]
    given = _parsed(await request.body())
    try:
        file = parse_one(chatbot_id, given, safe=request.state["safe"])
        require_reachable(file, Reach.parse(request.state["settings"].provider_networks))
        actor = Actor(principal_of(request).id, request_id(request.scope))
        version, changed = await retry_conflicts(lambda: _apply(request.state["pool"], chatbot_id, file, actor))
    except Misconfigured as error:
        mistakes = error.extra.get("mistakes", [error.detail])
        raise Invalid("configuration_invalid", error.detail, mistakes=mistakes) from None
    answer = ReplaceAnswer(chatbot_id=chatbot_id, version=version, changed=changed)
    return Response(answer.model_dump_json(), media_type="application/json", headers={"Cache-Control": "no-store"})


def _parsed(body: bytes) -> dict[str, Any]:
    """As every body, but that a name which is there twice is a mistake: half of a configuration would be lost."""
    given = parse_object(body)
    try:
        json.loads(body, object_pairs_hook=_unique)
    except RecursionError:
        raise BadRequest("invalid_json", "The body is nested too deeply.") from None
    return given


def _unique(members: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(members)
    if len(found) < len(members):
        names = [name for name, _ in members]
        twice = next(name for name in names if names.count(name) > 1)
        told = f"the member {clean(twice[:100])!r} is there twice"
        raise Invalid("configuration_invalid", f"The configuration is not usable: {told}.", mistakes=[told])
    return found


async def _apply(pool: Pool, chatbot_id: str, file: File, actor: Actor) -> tuple[int, bool]:
    async with pool.acquire() as connection:
        changes = await chatbots.apply(connection, file, actor=actor)
        if changes:
            return changes[0].version, True
        return await chatbots.newest_version(connection, chatbot_id), False
