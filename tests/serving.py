"""A real gateway on loopback and a client of it, for the tests that look from outside."""

import asyncio
import ssl
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import httpx2

from app.flows import chatbots, file
from app.server import gateway
from app.settings import load

# Tests ask faster than people.
UNLIMITED = {"rate_user": "none", "rate_address": "none"}


# Loopback shows no certificates, and loading those that one would believe takes each client 40 ms.
_BELIEVES_NONE = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


@asynccontextmanager
async def client_of(url: str = "", *, timeout: float = 10) -> AsyncGenerator[httpx2.AsyncClient, None]:
    async with httpx2.AsyncClient(base_url=url, verify=_BELIEVES_NONE, trust_env=False, timeout=timeout) as client:
        yield client


@asynccontextmanager
async def serving(database: str, **settings: Any) -> AsyncGenerator[httpx2.AsyncClient, None]:
    """A client of a gateway that is ready, and open to anybody unless the settings say otherwise."""
    async with (
        gateway(load(**{"auth": "open", **UNLIMITED, **settings}, database_url=database, port=0)) as url,
        client_of(url) as client,
    ):
        await until_ready(client)
        yield client


async def until_ready(client: httpx2.AsyncClient) -> None:
    """Ask until new work is taken, for ten seconds at most."""
    async with asyncio.timeout(10):
        while (await client.get("/readyz")).status_code != 200:
            await asyncio.sleep(0.01)


async def apply_demo(database: str, base_url: str, models: Mapping[str, str]) -> None:
    """Make chatbots of these ids, each with its model of the demo provider."""
    wanted = {
        "providers": {"demo": {"kind": "openai", "base_url": base_url}},
        "chatbots": {name: {"flows": {"main": {"provider": "demo", "model": model}}} for name, model in models.items()},
    }
    connection = await asyncpg.connect(database)
    try:
        await chatbots.apply(connection, file.parse(str(wanted)))
    finally:
        await connection.close()
