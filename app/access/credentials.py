"""From the headers of a request to its principal, as PARLEY_AUTH says: nobody is asked, or all are for key or token."""

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Literal

from app.access.anybody import ANYBODY_HERE, Anybody, Headers, allowed_hosts, is_loopback
from app.access.client import trusted_proxies
from app.access.keys import PREFIX, Keys
from app.access.links import Links
from app.access.origins import origins
from app.access.principal import Principal
from app.errors import Misconfigured, Unauthorized
from app.settings import Settings

if TYPE_CHECKING:
    from app.access.user_tokens import UserTokens

Mode = Literal["keys", "jwt", "keys,jwt", "open"]
# A bearer token that is no API key, to its user. Raises Unauthorized.
Tokens = Callable[[str], Awaitable[Principal]]

_NAMES = (b"authorization", b"x-api-key")
_HOW = (
    "Send an API key as `Authorization: Bearer KEY` or `X-API-Key: KEY` (`parley keys create` makes one), or a user's "
    "token as `Authorization: Bearer TOKEN`, where the server takes them."
)


class Credentials:
    """`anybody`: who may ask an open server."""

    def __init__(
        self,
        mode: Mode,
        keys: Keys,
        *,
        anybody: Anybody = ANYBODY_HERE,
        tokens: Tokens | None = None,
        links: Links | None = None,
    ) -> None:
        self._mode = mode
        self._links = links
        self._keys = keys
        self._anybody = anybody
        self._tokens = tokens

    async def principal(self, headers: Headers) -> Principal:
        """Raises Unauthorized or Forbidden, or Unavailable where they cannot be checked now."""
        if self._mode == "open":
            return self._anybody.principal(headers)
        given = _given(headers)
        if self._tokens is None or (given.startswith(PREFIX) and "keys" in self._mode):
            return await self._keys.principal(given)
        return await self._tokens(given)

    async def proof(self, token: str) -> Principal:
        """The user whose token somebody shows beside credentials of their own. Raises Unauthorized."""
        if self._tokens is None or token.startswith(PREFIX):
            raise Unauthorized("credentials_invalid", "That is no user's token of this server.")
        return await self._tokens(token)

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


def tokens_of(settings: Settings) -> "UserTokens | None":
    """What checks users' tokens, where any are taken. Raises Misconfigured."""
    if "jwt" not in settings.auth:
        return None
    # PyJWT with its algorithms takes some 50 ms of CPU to import: for those who take tokens.
    from app.access.user_tokens import user_tokens

    return user_tokens(settings)


def require_safe(settings: Settings) -> None:
    """Raises Misconfigured where tokens cannot be checked, strangers would be believed or every web page allowed, or a
    whole network would be let in without a word of it, or a name is none.
    """
    tokens_of(settings)
    trusted_proxies(settings)
    origins(settings)
    allowed_hosts(settings)
    if settings.auth == "open" and not (is_loopback(settings.host) or settings.open_anywhere):
        raise Misconfigured(
            "open_anywhere",
            f"PARLEY_AUTH=open lets whoever reaches {settings.host} act as any user. Listen on 127.0.0.1 (PARLEY_HOST)"
            ", ask for API keys (PARLEY_AUTH=keys), or set PARLEY_OPEN_ANYWHERE=true if something in front asks.",
        )
