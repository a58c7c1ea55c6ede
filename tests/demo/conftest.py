"""A demo provider per test, and a client to ask it with."""

from collections.abc import AsyncIterator

import httpx2
import pytest

from app.demo import demo_provider
from tests.serving import client_of


@pytest.fixture
async def demo_url() -> AsyncIterator[str]:
    async with demo_provider() as url:
        yield url


@pytest.fixture
async def client(demo_url: str) -> AsyncIterator[httpx2.AsyncClient]:
    async with client_of(demo_url) as client:
        yield client
