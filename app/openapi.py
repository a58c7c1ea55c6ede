"""The API described by itself: /openapi.json, assembled once from the route table, and /docs, which renders it.

What is said about a route is an `Operation`; everything that holds for all of them is added here.
"""

import base64
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import orjson
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from app import __version__
from app.access.demands import Demand, demands

Json = dict[str, Any]

_PAGE = Path(__file__).with_name("docs.html")
_SCHEMAS = "#/components/schemas/{model}"
_ABOUT = (
    "Send a message, then read the answer as a stream of events that is stored before it is shown and can be read "
    "again from any position, by polling or as server-sent events.\n\n"
    "Every GET route answers HEAD, and every route answers OPTIONS with 204 and `Allow`. Failures are "
    "`application/problem+json` with a stable `code`; its `error_id` finds the row in the table `error_logs`, "
    "where it deserves one.\n\n"
    "Unless the server is open to anybody on its machine, every route but a few needs an API key with the scope that "
    "it names: `Authorization: Bearer KEY`, or `X-API-Key: KEY`. A key acts for any user."
)


@dataclass(frozen=True, slots=True)
class Parameter:
    name: str
    place: Literal["path", "query", "header"]
    description: str
    schema: Json = field(default_factory=lambda: {"type": "string"})
    required: bool = False


@dataclass(frozen=True, slots=True)
class Content:
    """A body: of a model, or of a media type that has none (then `schema` says what it is)."""

    example: Any
    model: type[BaseModel] | None = None
    schema: Json = field(default_factory=lambda: {"type": "string"})


@dataclass(frozen=True, slots=True)
class Answer:
    """One status that is no problem: its bodies by media type, and the names of its headers."""

    description: str
    content: Mapping[str, Content] = field(default_factory=dict)
    headers: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Operation:
    """What one route takes and answers. `problems` are the stable error codes by status."""

    summary: str
    description: str
    answers: Mapping[int, Answer]
    parameters: Sequence[Parameter] = ()
    body: Content | None = None
    problems: Mapping[int, Sequence[str]] = field(default_factory=dict)


Operations = Mapping[tuple[str, str], Operation]


class Problem(BaseModel):
    """Why a request failed (RFC 9457). `mistakes` only with `configuration_invalid`, `scope` with `scope_missing`,
    `conversations` with `ambiguous`.
    """

    type: str
    title: str
    status: int
    detail: str
    code: str
    error_id: str
    success: Literal[False]
    mistakes: list[str] | None = None
    scope: str | None = None
    conversations: list[dict[str, str]] | None = None


class Reference:
    """The document of one app, built when it is first asked for: an import of the app pays nothing for it."""

    def __init__(self, operations: Operations, headers: Mapping[str, str]) -> None:
        self._operations = operations
        self._headers = headers
        self._body: bytes | None = None

    async def openapi(self, request: Request) -> Response:
        """GET /openapi.json"""
        if self._body is None:
            self._body = orjson.dumps(document(request.app.routes, self._operations, self._headers))
        return Response(self._body, headers={"Cache-Control": "no-cache"}, media_type="application/json")

    async def docs(self, _: Request) -> Response:
        """GET /docs"""
        page, headers = _page()
        return Response(page, headers=headers, media_type="text/html")


def operations_of(routes: Iterable[BaseRoute]) -> dict[tuple[str, str], Route]:
    """The routes by method and path. HEAD comes with every GET and is not listed."""
    served = [route for route in routes if isinstance(route, Route)]
    return {
        (method, route.path): route for route in served for method in sorted(route.methods or ()) if method != "HEAD"
    }


def document(routes: Iterable[BaseRoute], operations: Operations, headers: Mapping[str, str]) -> Json:
    """The OpenAPI 3.1 document. Raises KeyError for a route that `operations` does not describe."""
    paths: dict[str, Json] = {}
    table = demands()
    for (method, path), route in operations_of(routes).items():
        described = _operation(_name(route, method), operations[method, path], table[method, path])
        paths.setdefault(path, {})[method.lower()] = described
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Parley",
            "version": __version__,
            "description": _ABOUT,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {
            "schemas": _schemas(operations.values()),
            "headers": {name: {"description": text, "schema": {"type": "string"}} for name, text in headers.items()},
            "parameters": {"X-Request-Id": _parameter(_REQUEST_ID)},
            "securitySchemes": _SCHEMES,
            "responses": {
                "Problem": _problem("Any other failure.", ()),
                "Unauthorized": _problem(_UNAUTHORIZED, ("WWW-Authenticate",)),
                "Forbidden": _problem(_FORBIDDEN, ("WWW-Authenticate",)),
                "TooMany": _problem(_TOO_MANY, _LIMITED),
            },
        },
    }


def _name(route: Route, method: str) -> str:
    """Of a route that serves several methods, each operation has a name of its own."""
    several = (route.methods or set()) - {"HEAD", method}
    return f"{method.lower()}_{route.name}" if several else route.name


_REQUEST_ID = Parameter(
    "X-Request-Id",
    "header",
    "An id of yours for this request, in every log line and error row of it: 1 to 64 letters, digits, `.`, `_` or `-`. "
    "One is made where it is absent, or something else.",
)


_SCHEMES: Json = {
    "bearer": {
        "type": "http",
        "scheme": "bearer",
        "description": "An API key, or a user's token (JWT) where the server takes them.",
    },
    "key": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "The same key."},
}
_UNAUTHORIZED = "Problem: `credentials_missing`, `credentials_invalid`, `token_invalid`, `token_expired`."
_FORBIDDEN = "Problem: `scope_missing`, `user_mismatch`, `origin_unknown`, `host_unknown`."

_TOO_MANY = "Problem: `rate_limited`, `too_many_failures`."
_LIMITED = ("Retry-After", "RateLimit", "RateLimit-Policy")


def _security(demand: Demand) -> list[Json]:
    return [] if demand == "public" else [{name: [demand]} for name in _SCHEMES]


def _refusals(demand: Demand) -> Json:
    names = {} if demand == "public" else {"401": "Unauthorized", "403": "Forbidden", "429": "TooMany"}
    return {status: {"$ref": f"#/components/responses/{name}"} for status, name in names.items()}


def _operation(name: str, operation: Operation, demand: Demand) -> Json:
    parameters = [_parameter(parameter) for parameter in operation.parameters]
    answers = {str(status): _answer(answer) for status, answer in operation.answers.items()}
    problems = {str(status): _failure(status, codes) for status, codes in operation.problems.items()}
    described: Json = {
        "operationId": name,
        "summary": operation.summary,
        "description": operation.description + ("" if demand == "public" else f"\n\nNeeds the scope `{demand}`."),
        "security": _security(demand),
        "parameters": [*parameters, {"$ref": "#/components/parameters/X-Request-Id"}],
        "responses": {
            **answers,
            **_refusals(demand),
            **problems,
            "default": {"$ref": "#/components/responses/Problem"},
        },
    }
    if operation.body is not None:
        described["requestBody"] = {"required": True, "content": {"application/json": _content(operation.body)}}
    return described


def _parameter(parameter: Parameter) -> Json:
    return {
        "name": parameter.name,
        "in": parameter.place,
        "required": parameter.required or parameter.place == "path",
        "description": parameter.description,
        "schema": parameter.schema,
    }


def _answer(answer: Answer) -> Json:
    described: Json = {
        "description": answer.description,
        "headers": {name: {"$ref": f"#/components/headers/{name}"} for name in (*answer.headers, "X-Request-Id")},
    }
    if answer.content:
        described["content"] = {media_type: _content(content) for media_type, content in answer.content.items()}
    return described


def _content(content: Content) -> Json:
    schema = content.schema if content.model is None else {"$ref": _SCHEMAS.format(model=content.model.__name__)}
    return {"schema": schema, "example": content.example}


def _failure(status: int, codes: Sequence[str]) -> Json:
    told = [*codes, "rate_limited", "too_many_failures"] if status == 429 else codes
    again = _LIMITED if status == 429 else ("Retry-After",) if status == 503 else ()
    return _problem("Problem: " + ", ".join(f"`{code}`" for code in told) + ".", again)


def _problem(description: str, headers: Sequence[str]) -> Json:
    schema = {"$ref": _SCHEMAS.format(model=Problem.__name__)}
    answer = _answer(Answer(description, headers=headers))
    return {**answer, "content": {"application/problem+json": {"schema": schema}}}


def _schemas(operations: Iterable[Operation]) -> Json:
    given = [operation.body for operation in operations if operation.body is not None]
    told = [content for o in operations for answer in o.answers.values() for content in answer.content.values()]
    taken = {content.model for content in given if content.model is not None}
    answered = {content.model for content in told if content.model is not None} | {Problem}
    inputs, outputs = (sorted(models, key=lambda model: model.__name__) for models in (taken, answered))
    _, schemas = models_json_schema(
        [*((model, "validation") for model in inputs), *((model, "serialization") for model in outputs)],
        ref_template=_SCHEMAS,
    )
    definitions: Json = schemas["$defs"]
    return definitions


@cache
def _page() -> tuple[bytes, Mapping[str, str]]:
    """The page and its headers: only its own script and style run, and it talks to this server alone."""
    page = _PAGE.read_bytes()
    sources = {tag: f"'sha256-{_digest(page, tag)}'" for tag in ("script", "style")}
    policy = {
        "default-src": "'none'",
        "script-src": sources["script"],
        "style-src": sources["style"],
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "require-trusted-types-for": "'script'",
    }
    return page, {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cache-Control": "no-cache",
    }


def _digest(page: bytes, tag: str) -> str:
    found = re.search(rb"<%b>(.*?)</%b>" % (tag.encode(), tag.encode()), page, re.DOTALL)
    assert found is not None
    return base64.b64encode(hashlib.sha256(found[1]).digest()).decode()
