"""The providers in use: one of the right dialect per endpoint and key, and every dialect under the shared tests."""

from collections.abc import AsyncIterator
from typing import get_args

import pytest

from app.errors import Misconfigured
from app.providers.provider import Deadlines, Endpoint, Kind
from app.providers.registry import KINDS, Providers
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


def test_the_shared_tests_know_every_dialect() -> None:
    assert set(DIALECTS) == set(KINDS) <= set(get_args(Kind))
