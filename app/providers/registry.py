"""The providers in use: built from a configuration once, kept, and closed when the server stops."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Unpack

from app.providers.provider import Deadlines, Endpoint, Kind, Options, Provider
from app.providers.reach import ANYWHERE_NEAR, Reach
from app.references import resolve
from app.safe import NO_SAFE, Safe

# Each holds a connection pool; a server with more endpoints than this rebuilds the idle one unused for longest.
_KEPT = 64


class Providers:
    """One client per endpoint and key. A rotated key makes a new client, so no restart is needed.

    At most _KEPT are kept, and those with calls under way.
    """

    def __init__(
        self, *, deadlines: Deadlines, concurrency: int, safe: Safe = NO_SAFE, reach: Reach = ANYWHERE_NEAR
    ) -> None:
        self._reach = reach
        self._deadlines = deadlines
        self._concurrency = concurrency
        self._safe = safe
        self._providers: OrderedDict[tuple[Endpoint, str, str | None], Provider] = OrderedDict()
        self._closing: set[asyncio.Task[None]] = set()

    def get(self, endpoint: Endpoint) -> Provider:
        """Raises Misconfigured where a reference leads nowhere, or an encrypted key cannot be read."""
        key = (endpoint, resolve(endpoint.base_url), endpoint.api_key and self._safe.resolve(endpoint.api_key))
        if key not in self._providers:
            self._providers[key] = self._build(*key)
            self._retire()
        self._providers.move_to_end(key)
        return self._providers[key]

    def _retire(self) -> None:
        """Close what has been unused for longest, without waiting for it."""
        *older, _ = self._providers
        idle = [key for key in older if self._providers[key].idle]
        for key in idle[: max(0, len(self._providers) - _KEPT)]:
            closing = asyncio.get_running_loop().create_task(self._providers.pop(key).aclose(), name="provider closing")
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    def preload(self) -> None:
        """Import the dialects now, at a server's start, and not while the first message waits."""
        for kind in KINDS:
            import_module(f"app.providers.{kind}")

    def _build(self, endpoint: Endpoint, base_url: str, api_key: str | None) -> Provider:
        build = KINDS[endpoint.kind]
        return build(
            endpoint,
            base_url,
            api_key=api_key,
            deadlines=self._deadlines,
            concurrency=self._concurrency,
            reach=self._reach,
        )

    async def aclose(self) -> None:
        await asyncio.gather(*self._closing)
        for provider in self._providers.values():
            await provider.aclose()


# A dialect is imported where it is used: the HTTP client below it takes 0.4 s of CPU, too much for a command that only
# reads a configuration.


def _openai(endpoint: Endpoint, base_url: str, **options: Unpack[Options]) -> Provider:
    from app.providers.openai import OpenAI

    return OpenAI(
        endpoint.name, base_url, include_usage=endpoint.include_usage, limit_name=endpoint.limit_name, **options
    )


def _anthropic(endpoint: Endpoint, base_url: str, **options: Unpack[Options]) -> Provider:
    from app.providers.anthropic import Anthropic

    return Anthropic(endpoint.name, base_url, **options)


def _flowise(endpoint: Endpoint, base_url: str, **options: Unpack[Options]) -> Provider:
    from app.providers.flowise import Flowise

    return Flowise(endpoint.name, base_url, **options)


# A kind is the name of its module.
KINDS: Mapping[Kind, Callable[..., Provider]] = {"openai": _openai, "anthropic": _anthropic, "flowise": _flowise}
