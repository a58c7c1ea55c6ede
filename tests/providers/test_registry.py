"""The providers in use: one of the right dialect per endpoint and key, and every dialect under the shared tests."""

import asyncio
from collections.abc import AsyncIterator
from typing import get_args

import pytest

from app.errors import Misconfigured
from app.providers.provider import Deadlines, Endpoint, Kind
from app.providers.registry import _KEPT, KINDS, Providers
from tests.providers.answers import answered, prompt, text_of
from tests.providers.dialects import DIALECTS


@pytest.fixture
async def providers() -> AsyncIterator[Providers]:
    providers = Providers(deadlines=Deadlines(), concurrency=1)
    providers.preload()
    yield providers
    await providers.aclose()


@pytest.mark.parametrize("kind", KINDS)
async def test_an_endpoint_is_spoken_to_in_its_dialect(providers: Providers, demo_url: str, kind: Kind) -> None:
    provider = providers.get(Endpoint("any", kind, demo_url))
    assert type(provider) is DIALECTS[kind].provider
    chunks, error = await answered(provider, prompt("demo?delay_ms=0&say=Hi"))
    assert (text_of(chunks), error) == ("Hi", None)


async def test_one_client_serves_an_endpoint_until_its_key_changes(
    providers: Providers, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = Endpoint("any", "openai", "https://vendor.invalid/v1", "env:PARLEY_TEST_KEY")
    monkeypatch.setenv("PARLEY_TEST_KEY", "sk-one")
    before = providers.get(endpoint)
    assert providers.get(endpoint) is before
    monkeypatch.setenv("PARLEY_TEST_KEY", "sk-two")
    assert providers.get(endpoint) is not before
    monkeypatch.delenv("PARLEY_TEST_KEY")
    with pytest.raises(Misconfigured, match="PARLEY_TEST_KEY"):
        providers.get(endpoint)


async def test_few_clients_are_kept_and_none_with_a_call_under_way_is_closed(
    providers: Providers, demo_url: str
) -> None:
    def endpoint(number: int) -> Endpoint:
        return Endpoint(f"number {number}", "openai", demo_url)

    busy, idle = providers.get(endpoint(0)), providers.get(endpoint(1))
    await answered(idle, prompt("demo?delay_ms=0&say=Hi"))
    speaking = busy.stream(prompt("demo?tokens=50&delay_ms=5"))
    await anext(speaking)
    for number in range(2, 3 * _KEPT):
        providers.get(endpoint(number))
    assert len(providers._providers) == _KEPT
    assert providers.get(endpoint(0)) is busy
    assert len([batch async for batch in speaking]) > 5
    while providers._closing:
        await asyncio.sleep(0)
    chunks, error = await answered(providers.get(endpoint(1)), prompt("demo?delay_ms=0&say=Hi"))
    assert (text_of(chunks), error) == ("Hi", None)
    with pytest.raises(RuntimeError, match="closed"):
        await answered(idle, prompt("demo?delay_ms=0&say=Hi"))


def test_the_shared_tests_know_every_dialect() -> None:
    assert set(DIALECTS) == set(KINDS) <= set(get_args(Kind))
