"""Streaming URLs: with a token where requests are asked for credentials, as an EventSource cannot send headers."""

from collections.abc import Callable, Sequence
from math import ceil
from time import time
from uuid import UUID

from app.access.principal import Principal
from app.access.signing import Signing
from app.access.stream_token import StreamToken, signed
from app.errors import Unauthorized, Unavailable

# How much longer than its answer may take a URL is good, in seconds.
_GRACE_S = 15 * 60
# The most tokens of one request; no more streams than this can be asked for (PARLEY_READER_STREAMS).
_MOST = 100


class Links:
    """`signing` None: URLs are plain. `run_s`: the longest answer; `queue`: the most that wait in front of one."""

    def __init__(self, signing: Signing | None, *, run_s: float, queue: int, clock: Callable[[], float] = time) -> None:
        self._signing = signing
        self._run_s = run_s
        self._queue = queue
        self._clock = clock

    def url(self, stream_id: UUID, *, queued: bool = False) -> str:
        """Good until the answer's deadline and a quarter of an hour more. `queued`: each answer in front of it may take
        as long as its own."""
        url = f"/api/stream-events/{stream_id}"
        if self._signing is None:
            return url
        if (key := self._signing.first) is None:
            raise Unavailable("starting", "The server is starting: it has no signing key yet.", retry_after=2)
        return f"{url}?token={signed(key, stream_id, until=self._until(stream_id, queued=queued))}"

    def _until(self, stream_id: UUID, *, queued: bool) -> int:
        """Counted from when the stream was made, which its id says, so that all who ask meanwhile are told the same
        URL; as often again as it takes for those who ask later."""
        life = self._run_s * (1 + self._queue * queued) + _GRACE_S
        made = (stream_id.int >> 80) / 1000
        lives = max(1, ceil((self._clock() + _GRACE_S - made) / life))
        return ceil(made + lives * life)

    async def reader(self, tokens: Sequence[str]) -> Principal:
        """Who holds them: may read these streams and nothing else, until the first token ends.

        Raises Unauthorized where one of them is not good.
        """
        if len(tokens) > _MOST:
            raise _invalid()
        found = [await self._checked(token) for token in tokens]
        streams = frozenset(token.stream_id for token in found)
        return Principal("token", "token", frozenset({"read"}), streams=streams, until=min(t.until for t in found))

    async def _checked(self, text: str) -> StreamToken:
        token = StreamToken.parse(text)
        key = await self._signing.find(token.key_id) if token and self._signing else None
        if token is None or key is None or not token.is_by(key):
            raise _invalid()
        if token.until <= self._clock():
            raise Unauthorized("token_expired", "This streaming URL has expired; ask for the stream with credentials.")
        return token


def _invalid() -> Unauthorized:
    return Unauthorized("token_invalid", "The token of this streaming URL is not one of this server.")
