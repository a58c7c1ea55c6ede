"""A gateway, its demo provider, a client and a look into the database, all in this process."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

import asyncpg
import httpx2
import yaml

from app.demo.server import demo_provider
from app.flows import chatbots as chatbots_table
from app.flows import file
from tests.serving import apply_demo, serving
from tests.sse import Frame, read_stream


@dataclass
class House:
    client: httpx2.AsyncClient
    database: asyncpg.Connection
    demo: str

    async def post(self, chatbot: str = "quick", **fields: Any) -> httpx2.Response:
        body = {"user_id": "ann", "chatbot_id": chatbot, "message_text": "Hello", **fields}
        return await self.client.post("/api/process-message", json=body)

    async def ask(self, chatbot: str = "quick", **fields: Any) -> tuple[dict[str, Any], list[Frame]]:
        """The answer to the POST and all frames of the stream."""
        response = await self.post(chatbot, **fields)
        assert response.status_code == 200, response.text
        answer = response.json()
        return answer, await read_stream(self.client, answer["streaming_url"])

    async def apply(self, **chatbots: dict[str, Any]) -> None:
        """Make chatbots as a file would say them.

        Their provider is `demo`; `claude` is the same in another dialect, and where `gone` should be is nobody.
        """
        providers = {
            "demo": {"kind": "openai", "base_url": self.demo},
            "claude": {"kind": "anthropic", "base_url": self.demo.removesuffix("/v1")},
            "gone": {"kind": "openai", "base_url": "http://127.0.0.1:9/v1"},
        }
        wanted = file.parse(yaml.safe_dump({"providers": providers, "chatbots": chatbots}))
        await chatbots_table.apply(self.database, wanted)

    async def row(self, query: str) -> asyncpg.Record:
        """The first row of a query, once there is one: the journal writes behind the requests."""
        async with asyncio.timeout(10):
            while (row := await self.database.fetchrow(query)) is None:
                await asyncio.sleep(0.02)
        return row

    async def count(self, table: str) -> int:
        number: int = await self.database.fetchval(f"select count(*) from {table}")
        return number


def flow(say: str | None = None, **fields: Any) -> dict[str, Any]:
    """A flow of the demo provider that says this; `wishes` are added to its model."""
    wishes = {"delay_ms": "0", **fields.pop("wishes", {})} | ({"say": say} if say is not None else {})
    return {"provider": "demo", "model": f"demo?{urlencode(wishes)}", **fields}


Open = Callable[..., AbstractAsyncContextManager[House]]


@asynccontextmanager
async def open_house(
    database: str, models: dict[str, str] | None = None, **settings: Any
) -> AsyncGenerator[House, None]:
    """Chatbots with the models given, beside `quick`, and a gateway with the settings given."""
    chatbots = {"quick": "demo?delay_ms=0&tokens=20", **(models or {})}
    async with demo_provider() as url:
        await apply_demo(database, url, chatbots)
        connection = await asyncpg.connect(database)
        try:
            async with serving(database, **{"drain_s": 0, **settings}) as client:
                yield House(client, connection, url)
        finally:
            await connection.close()
