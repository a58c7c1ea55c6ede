"""One provider's HTTP side: pool, capacity, and the deadlines of each phase of a call."""

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from http.cookiejar import CookieJar, DefaultCookiePolicy

import httpx2

from app.errors import Misconfigured
from app.providers.aio import AioHTTPTransport, Body, unreachable_because
from app.providers.document import Document
from app.providers.provider import CONCURRENCY, Deadlines, ProviderError
from app.providers.reach import ANYWHERE_NEAR, Reach
from app.providers.refusal import Refusals, beginning
from app.providers.sse import Decoder

# How long the end of the HTTP body may come after the end of the answer, so that the connection can be used again.
_DRAIN_S = 0.1

_HEADERS = {
    "Accept": "text/event-stream, application/json",
    "Accept-Encoding": "identity",
    "Content-Type": "application/json",
    "User-Agent": "parley",
}


class Upstream:
    """The HTTP side of one provider, of at most `concurrency` calls at once.

    The key travels as a bearer token, or in the header `key_header`; `headers` are added to every request. Raises
    Misconfigured for a base URL or key that no request could carry.
    """

    def __init__(
        self,
        name: str,
        base_url: str,
        *,
        api_key: str | None = None,
        key_header: str | None = None,
        headers: Mapping[str, str] | None = None,
        deadlines: Deadlines | None = None,
        concurrency: int = CONCURRENCY,
        reach: Reach = ANYWHERE_NEAR,
    ) -> None:
        self.name = name
        self.refusals = Refusals(name, secret=api_key)
        self.under_way = 0
        self._deadlines = deadlines = deadlines or Deadlines()
        self._concurrency = concurrency
        self._client = httpx2.AsyncClient(
            base_url=_checked_url(name, base_url),
            headers={**_HEADERS, **(headers or {}), **_credentials(name, api_key, key_header)},
            cookies=CookieJar(policy=DefaultCookiePolicy(allowed_domains=[])),
            timeout=httpx2.Timeout(None, connect=deadlines.connect_s),
            follow_redirects=False,  # it would carry the key to a host nobody configured
            trust_env=False,
            transport=AioHTTPTransport(reach=reach),
        )

    async def aclose(self) -> None:
        await self._client.aclose()

    @property
    def full(self) -> bool:
        return self.under_way >= self._concurrency

    @property
    def idle(self) -> bool:
        return self.under_way == 0

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Room for one call. Without room ProviderError("busy") at once: a queue here would have no bound."""
        if self.full:
            raise ProviderError("busy", f"Provider '{self.name}' is at capacity.", retryable=True, retry_after=1)
        self.under_way += 1
        try:
            yield
        finally:
            self.under_way -= 1

    @asynccontextmanager
    async def post(self, path: str, content: bytes, *, documents: bool = False) -> AsyncIterator["Reading"]:
        """Send one request and read its event stream inside the block; leaving it early closes the connection.

        With `documents` JSON is an answer too, and one payload (`Reading.whole`).
        """
        silence = _Silence(self._deadlines.first_token_s)
        response = await self._send("POST", path, content, within_s=self._deadlines.first_token_s)
        try:
            whole = documents and "json" in response.headers.get("content-type", "").lower()
            if refusal := await self.refusals.of(response, streaming=not whole):
                raise refusal
            body: Body = response.extensions["body"]
            silence.watch(body.abort)
            yield Reading(self.name, body, whole=whole, silence=silence, gap_s=self._deadlines.gap_s)
        finally:
            silence.end()
            await response.aclose()

    async def get(self, path: str, *, within_s: float) -> bytes:
        """The beginning of one small answer. Raises ProviderError for anything but a 2xx."""
        response = await self._send("GET", path, None, within_s=within_s)
        try:
            if refusal := await self.refusals.of(response, streaming=False):
                raise refusal
            return await beginning(response)
        finally:
            await response.aclose()

    async def put(self, path: str, *, within_s: float) -> None:
        """A request whose answer does not matter, on a connection that is not kept. Raises ProviderError."""
        response = await self._send("PUT", path, None, within_s=within_s, headers={"Connection": "close"})
        await response.aclose()

    async def _send(
        self,
        method: str,
        path: str,
        content: bytes | None,
        *,
        within_s: float,
        headers: Mapping[str, str] | None = None,
    ) -> httpx2.Response:
        request = self._client.build_request(method, path, content=content, headers=headers)
        try:
            async with asyncio.timeout(within_s):
                return await self._client.send(request, stream=True)
        except httpx2.ConnectTimeout:
            raise _silent(self.name, "accept a connection", self._deadlines.connect_s) from None
        except TimeoutError:
            raise _silent(self.name, "answer", within_s) from None
        except httpx2.ConnectError as error:
            detail = f"Provider '{self.name}' cannot be reached: {unreachable_because(error)}."
            raise ProviderError("unavailable", detail, retryable=True) from error
        except httpx2.TransportError as error:
            raise _without_words(error, truncated(self.name)) from None


class Reading:
    """The event stream of one answer: iterate it for the data payloads that each network read completed.

    Where it is `whole` it is a document instead, and its body the only payload. Raises ProviderError when the provider
    stays silent for too long or the connection breaks.
    """

    def __init__(self, name: str, body: Body, *, whole: bool, silence: "_Silence", gap_s: float) -> None:
        self.whole = whole
        self._name = name
        self._body = body
        self._decoder: Decoder | Document = Document() if whole else Decoder()
        self._silence = silence
        self._gap_s = gap_s

    def __aiter__(self) -> "Reading":
        return self

    async def __anext__(self) -> list[bytes]:
        self._silence.listen()
        payloads: list[bytes] = []
        try:
            while not payloads:
                if not (data := await self._body.read()):
                    if not (payloads := self._decoder.end()):
                        raise StopAsyncIteration
                    break
                # One read is far smaller than what the decoder refuses: no payload is lost when it raises.
                payloads = list(self._decoder.feed(data))
        except httpx2.TransportError as error:
            raise _without_words(error, self._broken()) from None
        self._silence.pause()
        return payloads

    def _broken(self) -> ProviderError:
        if self._silence.too_long:
            return _silent(self._name, "send a token", self._silence.allowed_s)
        return truncated(self._name)

    def allow(self, seconds: float | None = None) -> None:
        """From here on this much silence, the gap between tokens unless given."""
        self._silence.allow(self._gap_s if seconds is None else seconds)

    async def drain(self) -> None:
        """Read past the end of the answer: a body that ends soon leaves a connection for the next call."""
        self._silence.allow(_DRAIN_S)
        self._silence.listen()
        try:
            while await self._body.read():
                pass
        except httpx2.TransportError:
            pass  # the answer is whole; only the connection is lost


class _Silence:
    """Aborts a response after too long a silence. Listening again costs one assignment: the timer catches up later."""

    def __init__(self, allowed_s: float) -> None:
        self.allowed_s = allowed_s
        self.too_long = False
        self._loop = asyncio.get_running_loop()
        self._due = self._loop.time() + allowed_s
        self._heard = False
        self._timer: asyncio.TimerHandle | None = None

    def watch(self, abort: Callable[[], None]) -> None:
        self._abort = abort
        self._timer = self._loop.call_at(self._due, self._check)

    def allow(self, seconds: float) -> None:
        if seconds != self.allowed_s:
            self.end()
            self.allowed_s = seconds
            self._timer = self._loop.call_later(seconds, self._check)

    def listen(self) -> None:
        if self._heard:  # the first wait has counted since the request was sent
            self._due = self._loop.time() + self.allowed_s
        self._heard = True

    def pause(self) -> None:
        self._due = math.inf  # a slow consumer of ours is not the provider's silence

    def end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _check(self) -> None:
        now = self._loop.time()
        if now < self._due:
            self._timer = self._loop.call_at(min(self._due, now + self.allowed_s), self._check)
            return
        self.too_long = True
        self._abort()


def _silent(name: str, what: str, seconds: float) -> ProviderError:
    return ProviderError("timeout", f"Provider '{name}' did not {what} within {seconds:g} s.", retryable=True)


def _without_words(cause: httpx2.TransportError, told: ProviderError) -> ProviderError:
    """With the kind of its cause for operators. Its words repeat what the provider sent, and that may be our key."""
    told.add_note(f"It was a {type(cause.__cause__ or cause).__name__}.")
    return told


def truncated(name: str) -> ProviderError:
    detail = f"Provider '{name}' ended the connection before its answer was whole."
    return ProviderError("unavailable", detail, retryable=True)


def _checked_url(name: str, base_url: str) -> httpx2.URL:
    try:
        url = httpx2.URL(base_url)
    except httpx2.InvalidURL:
        url = httpx2.URL("")
    if url.scheme not in ("http", "https") or not url.host or url.userinfo or url.query or url.fragment:
        detail = f"The base_url of provider '{name}' must look like https://host/v1, without credentials or a query."
        raise Misconfigured("provider_url_invalid", detail)
    return url


def _credentials(name: str, api_key: str | None, header: str | None) -> dict[str, str]:
    if not api_key:
        return {}
    if not (api_key.isascii() and api_key.isprintable() and " " not in api_key):
        detail = f"The key of provider '{name}' holds a space, a line break or a character outside ASCII."
        raise Misconfigured("provider_key_invalid", detail)
    return {header: api_key} if header else {"Authorization": f"Bearer {api_key}"}
