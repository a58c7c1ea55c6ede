"""POST /api/upload-image from outside: what is stored, what is refused (I6), and what it may cost."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import httpx2
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from app.access.credentials import Credentials
from app.access.guard import Needs as GuardNeeds
from app.access.guard import guard
from app.access.keys import Keys
from app.access.limits import Limits as RateLimits
from app.access.links import Links
from app.access.principal import Principal
from app.chats.allowance import Allowance
from app.chats.decoders import Decoders
from app.chats.endpoints import Analysis, Needs, Question, upload_image
from app.chats.images import Images
from app.chats.picture import Limits
from app.errors import ParleyError
from app.operations import OPERATIONS
from app.postgres import open_pool
from app.server import gateway
from app.server import serving as serving_app
from app.settings import load
from app.telemetry import Metrics
from app.wall import Wall
from tests.access.users import as_user, serving_users
from tests.chats.pictures import base64_of, bomb, halves, picture, png, slow_jpeg, written
from tests.serving import client_of, serving

JPEG = picture("JPEG")
_STREAM = "0197c1a2-7b3c-7def-8a01-23456789abcd"


@pytest.fixture
async def client(database: str) -> AsyncGenerator[httpx2.AsyncClient, None]:
    async with serving(database) as client:
        yield client


def _body(data: bytes | str = JPEG, **fields: Any) -> dict[str, Any]:
    text = data if isinstance(data, str) else base64_of(data)
    return {"chatbot_id": "demo", "image_data": {"name": "a.jpg", "data": text}, "user_id": "ann", **fields}


async def _upload(client: httpx2.AsyncClient, data: bytes | str = JPEG, **fields: Any) -> httpx2.Response:
    return await client.post("/api/upload-image", json=_body(data, **fields), timeout=30)


async def _rows(database: str) -> int:
    connection = await asyncpg.connect(database)
    try:
        rows: int = await connection.fetchval("select count(*) from images")
        return rows
    finally:
        await connection.close()


async def test_an_upload_is_stored_once_and_described(client: httpx2.AsyncClient, database: str) -> None:
    response = await _upload(client, written(halves((300, 200)), "GIF"), message_text=None)
    assert response.status_code == 200
    answer = response.json()
    assert answer.keys() == {"success", "image", "analysis", "streaming_session_id", "streaming_url"}
    assert (answer["success"], answer["analysis"], answer["streaming_session_id"]) == (True, None, None)
    image = answer["image"]
    assert image.keys() == {"id", "mime", "width", "height", "bytes", "sha256"}
    assert (image["mime"], image["width"], image["height"]) == ("image/png", 300, 200)
    assert (await _upload(client, written(halves((300, 200)), "GIF"))).json() == answer
    other = await _upload(client, written(halves((300, 200)), "GIF"), user_id="bob")
    assert other.json()["image"]["id"] != image["id"]
    assert other.json()["image"]["sha256"] == image["sha256"]
    assert await _rows(database) == 2


async def test_three_fields_are_enough_and_the_documented_example_works(client: httpx2.AsyncClient) -> None:
    operation = OPERATIONS["POST", "/api/upload-image"]
    assert operation.body is not None
    response = await client.post("/api/upload-image", json=operation.body.example)
    (example,) = operation.answers[200].content.values()
    assert response.json()["image"].keys() == example.example["image"].keys()
    asked = await _upload(client, message_text="What is it?", configuration={"language": "en"})
    assert (asked.status_code, asked.json()["code"]) == (404, "chatbot_unknown"), "tests/flows/test_images.py asks one"


HTML = b"<!doctype html><script>alert(1)</script>"
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("garbage", _body("this is not base64"), "image_invalid"),
    ("no ASCII", _body("ÄÖÜ"), "image_invalid"),
    ("a lone surrogate", _body("\ud800"), "image_invalid"),
    ("empty", _body(""), "invalid_request"),
    ("an empty data URL", _body("data:image/png;base64,"), "image_invalid"),
    ("no picture", _body(HTML), "image_invalid"),
    ("broken off", _body(JPEG[:200]), "image_invalid"),
    ("without pixels", _body(png(0, 0, b"")), "image_invalid"),
    ("another type", _body(JPEG, image_data={"data": base64_of(JPEG), "mime": "image/png"}), "image_invalid"),
    ("HTML behind", _body(JPEG + HTML), "image_invalid"),
    ("ZIP behind", _body(picture("PNG") + b"PK\x03\x04"), "image_invalid"),
    ("GIF with a script", _body(picture("GIF", "P") + b"*/=1;alert(1)"), "image_invalid"),
    ("a bomb", _body(png(50_000, 50_000, b"")), "image_too_large"),
    ("no picture at all", {"chatbot_id": "demo"}, "invalid_request"),
    ("null", _body(image_data=None), "invalid_request"),
    ("text for a picture", _body(image_data=base64_of(JPEG)), "invalid_request"),
    ("no chatbot", _body(chatbot_id=""), "invalid_request"),
    ("a line break", _body(user_id="ann\r\nX-Evil: 1"), "invalid_request"),
    ("a long question", _body(message_text="ä" * 20_000), "message_too_long"),
    ("a list for text", _body(message_text=["Hello"]), "invalid_request"),
]


async def test_what_is_no_upload_is_refused_and_stores_nothing(client: httpx2.AsyncClient, database: str) -> None:
    for name, body, code in REFUSED:
        response = await _raw_upload(client, body)
        assert (response.status_code, response.json()["code"]) == (422, code), name
        assert base64_of(JPEG)[:100] not in response.text
    assert await _rows(database) == 0
    assert (await _upload(client)).status_code == 200


async def _raw_upload(client: httpx2.AsyncClient, body: dict[str, Any]) -> httpx2.Response:
    # ASCII with escapes, as a front end sends a lone surrogate.
    return await client.post("/api/upload-image", content=json.dumps(body).encode())


async def test_bodies_that_are_no_json_or_too_much_of_it(client: httpx2.AsyncClient) -> None:
    for content in (b"", b"{", b"[]", b'"text"', b"\xff", b"[" * 100_000, b'{"a":[' + b"[]," * 100_000 + b"[]]}"):
        response = await client.post("/api/upload-image", content=content)
        assert (response.status_code, response.json()["code"]) == (400, "invalid_json"), content[:10]


async def _chunks(size: int) -> AsyncIterator[bytes]:
    for _ in range(size // 65536):
        yield b" " * 65536


async def test_ten_megabytes_are_the_limit_declared_or_not(client: httpx2.AsyncClient) -> None:
    for content in (b" " * (11 << 20), _chunks(11 << 20)):
        response = await client.post("/api/upload-image", content=content)
        assert (response.status_code, response.json()["code"]) == (413, "body_too_large")
    response = await client.post("/api/upload-image", content=_chunks(10 << 20))
    assert (response.status_code, response.json()["code"]) == (400, "invalid_json")
    response = await _upload(client, "A" * ((10 << 20) - 1000))
    assert (response.status_code, response.json()["code"]) == (422, "image_invalid")


async def test_an_upload_that_never_comes_is_told_and_closed(database: str) -> None:
    """K12: it stands still, or it takes too long."""
    for setting in ("upload_timeout_s", "upload_stall_s"):
        async with serving(database, **{setting: 0.2}) as client:
            parts = urlsplit(str(client.base_url))
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
            writer.write(b"POST /api/upload-image HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\n{")
            async with asyncio.timeout(4):
                said = await reader.read()
            writer.close()
            assert said.startswith(b"HTTP/1.1 408 ")
            assert b'"code":"upload_too_slow"' in said
            assert (await _upload(client)).status_code == 200


async def test_idle_uploads_of_one_user_keep_nobody_out(database: str) -> None:
    async with serving_users(database, upload_stall_s=60, upload_timeout_s=60) as client:
        parts, head = urlsplit(str(client.base_url)), f"Authorization: {as_user('ann')['Authorization']}\r\n"
        idle = [await asyncio.open_connection(parts.hostname, parts.port) for _ in range(3)]
        for _, writer in idle:
            request = f"POST /api/upload-image HTTP/1.1\r\nHost: 127.0.0.1\r\n{head}Content-Length: 10485760\r\n\r\n{{"
            writer.write(request.encode())
            await writer.drain()
        assert (await client.get("/livez")).status_code == 200, "theirs were seen, too"
        upload = {"chatbot_id": "demo", "image_data": {"data": base64_of(JPEG)}}
        answer = await client.post("/api/upload-image", json=upload, headers=as_user("bob"))
        assert answer.status_code == 200
        for _, writer in idle:
            writer.close()


async def test_an_upload_that_moves_may_take_longer_than_one_that_stalls(database: str) -> None:
    async with serving(database, upload_stall_s=0.5, upload_timeout_s=60) as client:

        async def slowly() -> AsyncIterator[bytes]:
            for _ in range(8):
                yield b" " * (64 << 10)
                await asyncio.sleep(0.1)  # what is slow here is the sender

        answer = await client.post("/api/upload-image", content=slowly())
        assert (answer.status_code, answer.json()["code"]) == (400, "invalid_json")


async def test_pictures_that_take_too_long_do_not_keep_others_out(database: str) -> None:
    async with serving(database, image_timeout_s=1, image_decoders=2) as client:
        await _upload(client)
        async with asyncio.TaskGroup() as tasks:
            slow = [tasks.create_task(_upload(client, slow_jpeg(20_000))) for _ in range(2)]
            fast = tasks.create_task(_upload(client))
        for task in slow:
            assert (task.result().status_code, task.result().json()["code"]) == (422, "image_too_large")
        assert fast.result().status_code == 200
        assert (await _upload(client, bomb(1000, 1000))).status_code == 200


async def test_before_there_is_a_database_uploads_come_again() -> None:
    settings = load(database_url="postgresql://nobody@127.0.0.1:1/none", port=0, auth="open")
    async with gateway(settings) as url, client_of(url) as client:
        response = await _upload(client)
        assert (response.status_code, response.json()["code"]) == (503, "starting")
        assert int(response.headers["retry-after"]) >= 1


class _State(Needs, GuardNeeds):
    """What the route finds without the rest of the gateway."""


@asynccontextmanager
async def _alone(database: str, asked: list[Question], total: int) -> AsyncGenerator[httpx2.AsyncClient, None]:
    """The route without the rest of the gateway, and a flow that answers questions."""

    async def analyse(question: Question) -> Analysis:
        asked.append(question)
        return Analysis("A picture.", _STREAM)

    async def welcome(user_id: str, chatbot_id: str, principal: Principal) -> None:
        assert user_id in ("ann", "")
        assert (chatbot_id, principal.kind) == ("demo", "open")

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncGenerator[_State, None]:
        pool, decoders = await open_pool(database, 2), Decoders(Limits(), processes=1)
        yield _State(
            credentials=Credentials("open", Keys(pool)),
            settings=load(),
            links=Links(None, run_s=1, queue=0),
            limits=RateLimits({}, Metrics()),
            images=Images(Wall(pool), decoders),
            uploads=Allowance(total, of="uploads", wait_s=0.05),
            admit_upload=lambda: None,
            admit_question=welcome,
            analyse=analyse,
        )
        await decoders.aclose()
        await pool.close()

    async def refuse(_: Request[Any], error: Exception) -> Response:
        assert isinstance(error, ParleyError)
        return Response(error.code, error.status)

    routes = [Route("/api/upload-image", upload_image, methods=["POST"])]
    guard(routes, {("POST", "/api/upload-image"): "process"})
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers={ParleyError: refuse})
    async with serving_app(app, "127.0.0.1", 0) as url, client_of(url) as client:
        yield client


async def test_a_question_goes_to_the_flow_with_its_picture(database: str) -> None:
    asked: list[Question] = []
    async with _alone(database, asked, 10 << 20) as client:
        silent = await _upload(client, message_text="")
        answer = (await _upload(client, message_text="What is\x00 it?", configuration={"topK": 3})).json()
        anonymous = await _upload(client, message_text="And this?", user_id=None)
    assert (silent.json()["analysis"], silent.json()["streaming_session_id"]) == (None, None)
    assert (answer["analysis"], answer["streaming_session_id"]) == ("A picture.", _STREAM)
    assert answer["streaming_url"] == f"/api/stream-events/{_STREAM}"
    assert anonymous.status_code == 200
    first, second = asked
    assert (first.chatbot_id, first.text, first.configuration) == ("demo", "What is\ufffd it?", {"topK": 3})
    assert (str(first.image.id), first.user_id, second.user_id) == (answer["image"]["id"], "ann", None)


async def test_no_more_bodies_than_memory_is_there_for(database: str) -> None:
    """One that has announced much and sends nothing holds it; another is told to come again, before it is read."""
    async with _alone(database, [], 10 << 20) as client:
        parts = urlsplit(str(client.base_url))
        _, writer = await asyncio.open_connection(parts.hostname, parts.port)
        writer.write(b"POST /api/upload-image HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 10485760\r\n\r\n")
        await writer.drain()
        async with asyncio.timeout(10):
            while (response := await _upload(client)).status_code == 200:
                pass
        assert (response.status_code, response.text) == (503, "overloaded")
        writer.close()
        async with asyncio.timeout(10):
            while (await _upload(client)).status_code != 200:
                pass
