"""Who signs users' tokens: its keys, read again every few minutes, and kept for a day where they cannot be read.

At most one read in 30 s, whatever key ids strangers make up: requests only ask the one loop for it.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from functools import partial
from pathlib import Path
from time import monotonic
from urllib.parse import urlsplit

import httpx2

from app.access.issuer_keys import IssuerKey, Keys, find, parse, shared_secret
from app.errors import Misconfigured, Unavailable
from app.references import resolve
from app.ticker import every

# Raises OSError, ValueError, Misconfigured or an error of httpx2.
Read = Callable[[], Awaitable[Keys]]

_REFRESH_S = 300
_PAUSE_S = 30
_KEPT_S = 24 * 3600
_FETCH_S = 5
_LARGEST = 256 * 1024


class Issuer:
    """The keys of one issuer. `run` has to run for them to be there."""

    def __init__(self, read: Read, *, clock: Callable[[], float] = monotonic) -> None:
        self._read = read
        self._clock = clock
        self._keys: Keys = ()
        self._good_until = 0.0
        self._began: float | None = None
        self._reading = False
        self._wanted = asyncio.Event()
        self._read_once = asyncio.Event()

    async def run(self, failing: set[str]) -> None:
        """Read the keys now and then, until cancelled."""
        await every(
            _REFRESH_S, self.run_once, name="issuer keys", failing=failing, sooner=self._wanted, again_s=_PAUSE_S
        )

    async def run_once(self) -> None:
        """Raises what reading raises; the keys stay then."""
        self._began, self._reading = self._clock(), True
        try:
            keys = await self._read()
            if keys != self._keys:
                self._keys = keys
            self._good_until = self._clock() + _KEPT_S
        finally:
            self._reading = False
            self._read_once.set()
            self._read_once = asyncio.Event()

    @property
    def keys(self) -> Keys:
        """The same object for as long as they are the same keys."""
        if self._clock() >= self._good_until:
            self._keys = ()
        return self._keys

    async def key_for(self, kid: str | None, algorithm: str) -> IssuerKey | None:
        """Raises Unavailable while no key at all is known."""
        found = find(self.keys, kid, algorithm)
        if found is None and (self._reading or self._is_due()):
            await self._end_of_reading()
            found = find(self.keys, kid, algorithm)
        if found is None and not self.keys:
            detail = "Tokens cannot be checked: the keys of their issuer cannot be read just now."
            raise Unavailable("issuer_unavailable", detail, retry_after=5)
        return found

    def _is_due(self) -> bool:
        return self._began is None or self._clock() - self._began >= _PAUSE_S

    async def _end_of_reading(self) -> None:
        ended = self._read_once
        if not self._reading:
            self._wanted.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(_FETCH_S + 1):
                await ended.wait()


def from_url(url: str, algorithms: Collection[str]) -> Read:
    """A JWKS over HTTPS, or HTTP on this machine. Raises Misconfigured."""
    parts = urlsplit(url)
    near = parts.scheme == "http" and parts.hostname in ("localhost", "127.0.0.1", "::1")
    if not (parts.scheme == "https" or near) or not parts.hostname or "@" in parts.netloc:
        raise Misconfigured(
            "jwt_source", "PARLEY_JWT_JWKS_URL must be an https URL without credentials (http for 127.0.0.1 only)."
        )
    # No connection is kept, so nothing is left to close.
    client = httpx2.AsyncClient(
        headers={"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": "parley"},
        timeout=_FETCH_S,
        limits=httpx2.Limits(max_keepalive_connections=0),
        follow_redirects=False,  # they would lead to keys of hosts nobody configured
        trust_env=False,
    )

    async def read() -> Keys:
        async with asyncio.timeout(_FETCH_S):
            return parse(await _fetch(client, url), algorithms)

    return read


async def _fetch(client: httpx2.AsyncClient, url: str) -> bytes:
    document = bytearray()
    async with client.stream("GET", url) as response:
        if response.status_code != 200:
            raise ValueError(f"the JWKS URL answered {response.status_code}")
        async for piece in response.aiter_raw():
            document += piece
            if len(document) > _LARGEST:
                raise ValueError(f"the JWKS is larger than {_LARGEST} bytes")
    return bytes(document)


def from_file(path: Path, algorithms: Collection[str]) -> Read:
    """A public key in PEM, or a JWKS. Raises Misconfigured where there is none now."""

    def read() -> Keys:
        with path.open("rb") as file:
            return parse(file.read(_LARGEST), algorithms)

    return _checked("PARLEY_JWT_KEY_FILE", read)


def from_secret(reference: str) -> Read:
    """A secret for HS256. Raises Misconfigured where the reference leads to none now."""
    if not reference.startswith(("env:", "file:")):
        raise Misconfigured("jwt_source", "PARLEY_JWT_SECRET is a reference, env:NAME or file:PATH, never the secret.")
    return _checked("PARLEY_JWT_SECRET", lambda: shared_secret(resolve(reference)))


def _checked(name: str, read: Callable[[], Keys]) -> Read:
    try:
        read()
    except (OSError, ValueError) as error:
        why = f"cannot be read ({type(error).__name__})" if isinstance(error, OSError) else str(error)
        raise Misconfigured("jwt_source", f"{name} is not usable: {why}.") from None
    return partial(asyncio.to_thread, read)
