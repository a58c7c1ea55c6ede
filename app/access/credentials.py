"""From the headers of a request to its principal, as PARLEY_AUTH says: nobody is asked, or all are for key or token."""

import ipaddress
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from typing import Literal
from urllib.parse import urlsplit

from app.access.client import trusted_proxies
from app.access.keys import PREFIX, Keys
from app.access.links import Links
from app.access.origins import origins
from app.access.principal import SCOPES, Principal
from app.access.user_tokens import user_tokens
from app.errors import Forbidden, Misconfigured, Unauthorized
from app.settings import Settings

Mode = Literal["keys", "jwt", "keys,jwt", "open"]
Headers = Iterable[tuple[bytes, bytes]]
# A bearer token that is no API key, to its user. Raises Unauthorized.
Tokens = Callable[[str], Awaitable[Principal]]

_ANYBODY = Principal("open", "open", frozenset(SCOPES) - {"admin"})
_ANYBODY_HERE = Principal("open", "open", frozenset(SCOPES))
_NAMES = (b"authorization", b"x-api-key")
_HOW = (
    "Send an API key as `Authorization: Bearer KEY` or `X-API-Key: KEY` (`parley keys create` makes one), or a user's "
    "token as `Authorization: Bearer TOKEN`, where the server takes them."
)


class Credentials:
    """`local`: the server listens on its own machine only. `pages`: origins of web pages that may ask it."""

    def __init__(
        self,
        mode: Mode,
        keys: Keys,
        *,
        local: bool,
        pages: Collection[str] = (),
        tokens: Tokens | None = None,
        links: Links | None = None,
    ) -> None:
        self._mode = mode
        self._links = links
        self._keys = keys
        self._local = local
        self._pages = pages
        self._tokens = tokens

    async def principal(self, headers: Headers) -> Principal:
        """Raises Unauthorized, or Unavailable where they cannot be checked now."""
        if self._mode == "open":
            host = _first(headers, b"host")
            if self._local and (origin := _first(headers, b"origin")):
                self._require_near(origin, host)
            # The name that the client used must be this machine's, too: a web page whose name was pointed at it
            # (DNS rebinding) is no administrator, and neither is whoever comes through a proxy.
            return _ANYBODY_HERE if self._local and is_loopback(_hostname(f"//{host}")) else _ANYBODY
        given = _given(headers)
        if self._tokens is None or (given.startswith(PREFIX) and "keys" in self._mode):
            return await self._keys.principal(given)
        return await self._tokens(given)

    def _require_near(self, origin: str, host: str) -> None:
        """Any page that a browser shows can send a message to its own machine, if not read the answer."""
        if origin not in self._pages and origin.partition("://")[2] != host and not is_loopback(_hostname(origin)):
            raise Forbidden(
                "origin_unknown",
                "Without authentication only web pages of this machine may ask; PARLEY_CORS_ORIGINS names others.",
            )

    async def reader(self, stream_tokens: Sequence[str], headers: Headers) -> Principal:
        """Who reads with the tokens of streaming URLs; where those are no good, whoever the headers name.

        Raises as `principal`.
        """
        if self._mode == "open" or self._links is None or not stream_tokens:
            return await self.principal(headers)
        try:
            return await self._links.reader(stream_tokens)
        except Unauthorized:
            if not any(name in _NAMES for name, _ in headers):
                raise
            return await self.principal(headers)


def _given(headers: Headers) -> str:
    named = [value for name, value in headers if name == b"x-api-key"]
    found = named or [value for name, value in headers if name == b"authorization"]
    if not found:
        raise Unauthorized("credentials_missing", _HOW)
    value = found[0].decode("latin-1")
    scheme, _, rest = ("bearer", "", value) if named else value.partition(" ")
    if len(found) > 1 or scheme.lower() != "bearer":
        raise Unauthorized("credentials_invalid", f"These are no credentials for this server. {_HOW}")
    return rest.strip()


def _first(headers: Headers, name: bytes) -> str:
    return next((value for given, value in headers if given == name), b"").decode("latin-1")


def _hostname(url: str) -> str:
    """The name of the host in it, empty where there is none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def require_safe(settings: Settings) -> None:
    """Raises Misconfigured where tokens cannot be checked, strangers would be believed or every web page allowed, or a
    whole network would be let in without a word of it.
    """
    user_tokens(settings)
    trusted_proxies(settings)
    origins(settings)
    if settings.auth == "open" and not (is_loopback(settings.host) or settings.open_anywhere):
        raise Misconfigured(
            "open_anywhere",
            f"PARLEY_AUTH=open lets whoever reaches {settings.host} act as any user. Listen on 127.0.0.1 (PARLEY_HOST)"
            ", ask for API keys (PARLEY_AUTH=keys), or set PARLEY_OPEN_ANYWHERE=true if something in front asks.",
        )
