"""/openapi.json and /docs: complete, valid by themselves, and true of a real server's answers."""

import re
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import httpx2
import pytest
from starlette.routing import Route

from app import __version__
from app.demo import demo_provider
from app.main import create_app
from app.openapi import document, operations_of
from app.operations import HEADERS, OPERATIONS
from app.settings import load
from tests.serving import apply_demo, serving

Json = dict[str, Any]

_TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}
_KNOWN = {
    *("$ref", "type", "anyOf", "enum", "const", "properties", "required", "items", "additionalProperties", "pattern"),
    *("oneOf", "discriminator", "maxItems", "minimum", "exclusiveMaximum", "maximum"),
    *("title", "description", "default", "minLength", "maxLength", "format"),
}


def _routes() -> list[Route]:
    app = create_app(load(database_url="postgresql://nobody@127.0.0.1:1/none"))
    return [route for route in app.routes if isinstance(route, Route)]


@pytest.fixture(scope="module")
def spec() -> Json:
    return document(_routes(), OPERATIONS, HEADERS)


@pytest.fixture
async def client(database: str) -> AsyncGenerator[httpx2.AsyncClient, None]:
    """A client of a gateway that has the chatbot `demo`."""
    async with demo_provider() as provider:
        await apply_demo(database, provider, {"demo": "demo?tokens=5&delay_ms=0"})
        async with serving(database) as client:
            yield client


def _mismatch(spec: Json, schema: Json, value: Any, place: str = "") -> str | None:
    """Why a value does not fit a schema, as far as our schemas go; every keyword they use must be known here."""
    if unknown := schema.keys() - _KNOWN:
        return f"{place}: the test does not know {unknown}"
    if "$ref" in schema:
        return _mismatch(spec, _follow(spec, schema["$ref"]), value, place)
    if options := schema.get("anyOf") or schema.get("oneOf"):
        found = [_mismatch(spec, option, value, place) for option in options]
        return None if None in found else "; ".join(map(str, found))
    if "type" in schema and not isinstance(value, _TYPES[schema["type"]]):
        return f"{place}: {value!r} is no {schema['type']}"
    if value not in schema.get("enum", [schema.get("const", value)]):
        return f"{place}: {value!r} is not allowed"
    if isinstance(value, list):
        found = [_mismatch(spec, schema.get("items", {}), item, f"{place}[]") for item in value]
        return next(filter(None, found), None)
    return _object_mismatch(spec, schema, value, place) if isinstance(value, dict) else None


def _object_mismatch(spec: Json, schema: Json, value: Json, place: str) -> str | None:
    properties = schema.get("properties")
    if missing := set(schema.get("required", [])) - value.keys():
        return f"{place} lacks {missing}"
    if properties is None:
        return None
    if extra := value.keys() - properties.keys():
        return f"{place} has undocumented {extra}"
    found = [_mismatch(spec, properties[name], item, f"{place}.{name}") for name, item in value.items()]
    return next(filter(None, found), None)


def _follow(spec: Json, ref: str) -> Json:
    found: Any = spec
    for key in ref.removeprefix("#/").split("/"):
        found = found[key]
    assert isinstance(found, dict)
    return found


def _nodes(value: Any) -> Iterator[Json]:
    if isinstance(value, dict):
        yield value
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _nodes(child)


def _check(spec: Json, response: httpx2.Response, path: str) -> None:
    """Status, media type, headers and body of a real answer are documented."""
    documented = spec["paths"][path][response.request.method.lower()]["responses"]
    answer = documented[str(response.status_code)]
    media_type = response.headers["content-type"].partition(";")[0]
    why = _mismatch(spec, answer["content"][media_type]["schema"], response.json(), path)
    assert why is None, why


def test_every_route_has_an_entry_and_every_entry_a_route() -> None:
    assert operations_of(_routes()).keys() == OPERATIONS.keys()


def test_a_route_without_an_entry_is_told() -> None:
    routes = [*_routes(), Route("/new", lambda request: None)]
    with pytest.raises(KeyError, match="/new"):
        document(routes, OPERATIONS, HEADERS)


def test_the_document_holds_together(spec: Json) -> None:
    assert spec["openapi"].startswith("3.1.")
    assert spec["info"]["version"] == __version__
    for node in _nodes(spec):
        if "$ref" in node:
            assert _follow(spec, node["$ref"]), node
    operations = [operation for methods in spec["paths"].values() for operation in methods.values()]
    names = [operation["operationId"] for operation in operations]
    assert len(set(names)) == len(names)
    for operation in operations:
        assert operation["summary"]
        assert operation["description"]
        assert all(response.get("description") or "$ref" in response for response in operation["responses"].values())


def test_path_parameters_are_those_of_the_path(spec: Json) -> None:
    for path, methods in spec["paths"].items():
        for operation in methods.values():
            told = [_follow(spec, p["$ref"]) if "$ref" in p else p for p in operation["parameters"]]
            in_path = {p["name"] for p in told if p["in"] == "path"}
            assert in_path == set(re.findall(r"{(\w+)}", path))
            assert {p["name"] for p in told if p["required"]} == in_path | (
                {"streams"} if path == "/api/stream" else set()
            )
            assert len({(p["in"], p["name"]) for p in told}) == len(told)


def test_examples_fit_their_schemas(spec: Json) -> None:
    contents = [node for node in _nodes(spec["paths"]) if "example" in node and "schema" in node]
    assert len(contents) == sum(
        len(answer.content) for operation in OPERATIONS.values() for answer in operation.answers.values()
    ) + sum(operation.body is not None for operation in OPERATIONS.values())
    for content in contents:
        assert _mismatch(spec, content["schema"], content["example"]) is None, content


def _example(path: str) -> Any:
    body = OPERATIONS["POST", path].body
    assert body is not None
    return body.example


async def test_answers_of_a_server_are_as_documented(spec: Json, client: httpx2.AsyncClient) -> None:
    question = {"user_id": "ann", "chatbot_id": "demo", "message_text": "Hello"}
    accepted = await client.post("/api/process-message", json=question)
    _check(spec, accepted, "/api/process-message")
    url = accepted.json()["streaming_url"]
    page, cursor = await client.get(url), 0
    while page.json()["has_more"]:
        _check(spec, page, "/api/stream-events/{stream_id}")
        cursor = page.json()["last_event_id"]
        page = await client.get(url, params={"after": cursor, "wait": 10})
    _check(spec, page, "/api/stream-events/{stream_id}")
    assert page.headers["etag"]
    uploaded = await client.post("/api/upload-image", json=_example("/api/upload-image"))
    _check(spec, uploaded, "/api/upload-image")
    for path in ("/api/conversation-health", "/livez", "/readyz"):
        _check(spec, await client.get(path), path)
    _check(spec, await client.get("/readyz?verbose"), "/readyz")


async def test_problems_of_a_server_are_as_documented(spec: Json, client: httpx2.AsyncClient) -> None:
    question = {"user_id": "ann", "chatbot_id": "demo", "message_text": "Hello"}
    empty = {"image_data": {"data": "data:image/png;base64,"}}
    stream = "/api/stream-events/0197c1a2-7b3c-7def-8a01-23456789abcd"
    failures = [
        (await client.post("/api/process-message", content=b"{"), 400, "invalid_json"),
        (await client.post("/api/process-message", json=question | {"chatbot_id": "nobody"}), 404, "chatbot_unknown"),
        (await client.post("/api/process-message", content=b" " * (5 << 20)), 413, "body_too_large"),
        (await client.post("/api/process-message", json={}), 422, "invalid_request"),
        (await client.post("/api/upload-image", json=_example("/api/upload-image") | empty), 422, "image_invalid"),
        (await client.get(stream), 404, "stream_unknown"),
        (await client.get(stream, params={"after": "x"}), 400, "bad_cursor"),
        (await client.get(stream, params={"limit": "x"}), 400, "bad_parameter"),
    ]
    for response, status, code in failures:
        assert (response.status_code, response.json()["code"]) == (status, code)
        path = "/api/process-message" if response.request.method == "POST" else "/api/stream-events/{stream_id}"
        _check(spec, response, path)
        assert code in OPERATIONS[response.request.method, path].problems[status]


async def test_the_document_is_served_and_built_once(spec: Json, client: httpx2.AsyncClient) -> None:
    first, second = await client.get("/openapi.json"), await client.get("/openapi.json")
    assert first.json() == spec
    assert first.content == second.content
    assert first.headers["content-type"] == "application/json"


async def test_the_page_needs_nothing_from_elsewhere(client: httpx2.AsyncClient) -> None:
    response = await client.get("/docs")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in re.split("[;,] ", response.headers["content-security-policy"]))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert policy["script-src"].startswith("'sha256-")
    assert policy["frame-ancestors"] == "'none'"
    assert not re.search(r"(https?:)?//[a-z]", response.text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\son\w+=|style=", response.text)
    assert len(re.findall("<script", response.text)) == len(re.findall("<style", response.text)) == 1
