"""The yardstick: what one writes first, Starlette relaying a provider with httpx2, nothing stored.

    python -m scripts.bench.passthrough PORT UPSTREAM

`/chat` reads every token and sends a frame for it; `/relay` passes the bytes on without a look.
"""

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import TypedDict

import httpx2
import orjson
import uvloop
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from app import server


class _State(TypedDict):
    client: httpx2.AsyncClient


async def _chat(request: Request[_State]) -> Response:
    body = await request.json()
    return StreamingResponse(_tokens(request.state["client"], body), media_type="text/event-stream")


async def _tokens(client: httpx2.AsyncClient, body: object) -> AsyncIterator[bytes]:
    async with client.stream("POST", "chat/completions", json=body) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                token = orjson.loads(line[6:])["choices"][0]["delta"].get("content")
                if token:
                    yield b"data: " + orjson.dumps({"token": token}) + b"\n\n"


async def _relay(request: Request[_State]) -> Response:
    body = await request.json()
    return StreamingResponse(_pieces(request.state["client"], body), media_type="text/event-stream")


async def _pieces(client: httpx2.AsyncClient, body: object) -> AsyncIterator[bytes]:
    async with client.stream("POST", "chat/completions", json=body) as response:
        async for piece in response.aiter_raw():
            yield piece


@asynccontextmanager
async def _lifespan(upstream: str, _: Starlette) -> AsyncIterator[_State]:
    unlimited = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx2.AsyncClient(base_url=upstream, timeout=60, limits=unlimited) as client:
        yield {"client": client}


async def _serve(port: int, upstream: str) -> None:
    routes = [Route("/chat", _chat, methods=["POST"]), Route("/relay", _relay, methods=["POST"])]
    leave = server.signals()
    async with server.serving(Starlette(routes=routes, lifespan=partial(_lifespan, upstream)), "127.0.0.1", port):
        print("ready", flush=True)
        await leave.wait()


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[1]), sys.argv[2]))
