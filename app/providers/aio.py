"""aiohttp's client under httpx2's transport interface: the same API, less than half the CPU per token.

Figures: docs/decisions/0002-aiohttp-under-httpx2.md.
"""

import socket
import ssl
from collections.abc import AsyncIterator

import aiohttp
import httpx2
from aiohttp.connector import AddrInfoType
from yarl import URL

from app.providers.reach import ANYWHERE_NEAR, OutOfReach, Reach

# Headers httpx2 has set already; aiohttp would add its own where one is missing.
_NEVER_ADDED = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")
# Per connection: reading pauses at twice this.
_READ_BUFFER = 64 * 1024


class AioHTTPTransport(httpx2.AsyncBaseTransport):
    """HTTP/1.1 with keep-alive and verified TLS. No cookies, redirects, decompression, proxies or netrc.

    Connects to addresses in `reach` only. Honours httpx2's connect and read timeouts. `extensions["body"]` of a
    response is its Body, for readers who count microseconds: three generators fewer per read than httpx2's iterators.
    """

    def __init__(
        self,
        *,
        keepalive_s: float = 15,
        tls: ssl.SSLContext | None = None,
        reach: Reach = ANYWHERE_NEAR,
    ) -> None:
        self._reach = reach
        self._keepalive_s = keepalive_s
        self._tls = tls
        self._session: aiohttp.ClientSession | None = None

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        content = await request.aread()
        try:
            answer = await self._open_session().request(
                request.method,
                URL(str(request.url), encoded=True),
                data=content or None,
                headers=request.headers.multi_items(),
                allow_redirects=False,
                timeout=_timeout(request),
            )
        except aiohttp.ClientError as error:
            raise _translated(error) from error
        body = Body(answer)
        extensions = {"http_version": b"HTTP/1.1", "body": body}
        return httpx2.Response(answer.status, headers=answer.raw_headers, stream=body, extensions=extensions)

    async def aclose(self) -> None:
        if self._session is not None:
            await self._session.close()

    def _socket(self, address: AddrInfoType) -> socket.socket:
        """For a connection to this very address, however its name was resolved."""
        family, kind, protocol, _, (host, *_) = address
        if not self._reach.allows(str(host)):
            raise OutOfReach
        return socket.socket(family, kind, protocol)

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:  # here and not in __init__: aiohttp binds to the running loop
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    limit=0,  # the caller counts its calls; a second queue would only hide them
                    keepalive_timeout=self._keepalive_s,
                    ssl=self._tls or True,
                    socket_factory=self._socket,
                ),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                trust_env=False,
                skip_auto_headers=_NEVER_ADDED,
                read_bufsize=_READ_BUFFER,
            )
        return self._session


class Body(httpx2.AsyncByteStream):
    """The body of a response, read or given up."""

    def __init__(self, answer: aiohttp.ClientResponse) -> None:
        self._answer = answer

    async def read(self) -> bytes:
        """What the network brought since the last read, waiting for at least a byte; b"" at the end."""
        try:
            return await self._answer.content.readany()
        except aiohttp.ClientError as error:
            raise _translated(error) from error

    def abort(self) -> None:
        """Close the connection at once; whoever waits in `read` gets httpx2.ReadError. Nothing after a whole body."""
        self._answer.close()  # after the end of the body its connection is back in the pool already

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while data := await self.read():
            yield data

    async def aclose(self) -> None:
        self.abort()


def unreachable_because(error: httpx2.ConnectError) -> str:
    """Why connecting failed, in words that hold no address."""
    match error.__cause__:
        case aiohttp.ClientConnectorDNSError():
            return "its host name cannot be resolved"
        case aiohttp.ClientSSLError():
            return "TLS failed or its certificate is not trusted"
        case aiohttp.ClientConnectorError(os_error=OutOfReach() as refused):
            return str(refused.strerror)
        case aiohttp.ClientConnectorError(os_error=ConnectionRefusedError()):
            return "it refuses connections"
        case _:
            return "no connection could be made"


def _timeout(request: httpx2.Request) -> aiohttp.ClientTimeout:
    asked = request.extensions.get("timeout", {})
    return aiohttp.ClientTimeout(total=None, connect=asked.get("connect"), sock_read=asked.get("read"))


def _translated(error: aiohttp.ClientError) -> httpx2.TransportError:
    """The httpx2 exception of the same meaning."""
    text = str(error)
    match error:
        case aiohttp.ConnectionTimeoutError():
            return httpx2.ConnectTimeout(text)
        case aiohttp.ServerTimeoutError():
            return httpx2.ReadTimeout(text)
        case aiohttp.ClientConnectorError():
            return httpx2.ConnectError(text)
        case aiohttp.NonHttpUrlClientError():
            return httpx2.UnsupportedProtocol(text)
        case aiohttp.ServerDisconnectedError() | aiohttp.ClientPayloadError() | aiohttp.ClientResponseError():
            return httpx2.RemoteProtocolError(text)
        case aiohttp.ClientConnectionError():
            return httpx2.ReadError(text)
        case _:
            return httpx2.TransportError(text)
