"""The providers in use: built from a configuration once, kept, and closed when the server stops."""

import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from app.errors import Misconfigured
from app.providers.openai import OpenAI
from app.providers.provider import Provider
from app.providers.transport import Deadlines, Effort

# Each holds a connection pool; a server with more endpoints than this rebuilds the one unused for longest.
_KEPT = 64


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a provider is and how to speak to it. `base_url` may be env:NAME, `api_key` env:NAME or file:PATH."""

    name: str
    kind: str
    base_url: str
    api_key: str | None = None
    include_usage: bool = True


class Providers:
    """One client per endpoint and key. A rotated key makes a new client, so no restart is needed."""

    def __init__(self, *, deadlines: Deadlines, effort: Effort) -> None:
        self._deadlines = deadlines
        self._effort = effort
        self._providers: OrderedDict[tuple[Endpoint, str, str | None], Provider] = OrderedDict()
        self._retired: list[Provider] = []

    def get(self, endpoint: Endpoint) -> Provider:
        """Raises Misconfigured where a reference leads nowhere."""
        key = (endpoint, resolve(endpoint.base_url), endpoint.api_key and resolve(endpoint.api_key))
        if key not in self._providers:
            self._providers[key] = self._build(*key)
            if len(self._providers) > _KEPT:
                self._retired.append(self._providers.popitem(last=False)[1])
        self._providers.move_to_end(key)
        return self._providers[key]

    def _build(self, endpoint: Endpoint, base_url: str, api_key: str | None) -> Provider:
        return OpenAI(
            endpoint.name,
            base_url,
            api_key=api_key,
            include_usage=endpoint.include_usage,
            deadlines=self._deadlines,
            effort=self._effort,
        )

    async def aclose(self) -> None:
        for provider in [*self._providers.values(), *self._retired]:
            await provider.aclose()


def resolve(reference: str) -> str:
    """The value behind env:NAME or file:PATH; any other text is its own value. Raises Misconfigured."""
    scheme, _, rest = reference.partition(":")
    if scheme == "env":
        if not (value := os.environ.get(rest)):
            raise Misconfigured("reference_missing", f"The environment variable {rest} is not set.")
        return value.strip()
    if scheme == "file":
        try:
            return Path(rest).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            raise Misconfigured("reference_missing", f"The file {rest} cannot be read.") from None
    return reference
