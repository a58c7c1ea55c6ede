"""The demo provider, providers of a dialect that talk to it with short deadlines, and what it remembers of them."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from app.demo import demo_provider
from app.providers.provider import Deadlines, Provider
from tests.providers.dialects import Dialect
from tests.serving import client_of

KEY = "sk-canary-0123456789"

Remembered = Callable[[str], Awaitable[list[dict[str, Any]]]]
Connect = Callable[..., Provider]


@pytest.fixture
async def demo_url() -> AsyncIterator[str]:
    async with demo_provider() as url:
        yield url


@pytest.fixture
async def connect(demo_url: str, dialect: Dialect) -> AsyncIterator[Connect]:
    """Make providers, for the demo unless given a URL; patient enough for a slow machine, but not for long.

    Each test module says which `dialect` it means, or all of them.
    """
    async with AsyncExitStack() as stack:

        def connected(url: str = demo_url, **options: Any) -> Provider:
            options = {
                "api_key": KEY,
                "deadlines": Deadlines(connect_s=2, first_token_s=5, gap_s=5),
                **options,
            }
            provider = dialect.provider("vendor", url, **options)
            stack.push_async_callback(provider.aclose)
            return provider

        yield connected


@pytest.fixture
async def remembered(demo_url: str) -> AsyncIterator[Remembered]:
    """The demo's records of the requests with a key, once all of them are over."""
    async with client_of(demo_url.removesuffix("/v1"), timeout=15) as client:

        async def records(key: str) -> list[dict[str, Any]]:
            answer = await client.get("/demo/requests", params={"key": key, "wait": "1"})
            listed: list[dict[str, Any]] = answer.raise_for_status().json()["requests"]
            return listed

        yield records
