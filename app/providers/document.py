"""A document where an event stream was asked for: the whole body is one payload."""

from collections.abc import Sequence

from app.providers.provider import ProviderError
from app.providers.sse import LIMIT


class Document:
    """The body of one answer; a Decoder for the reader. More than `limit` bytes raise ProviderError("too_large")."""

    def __init__(self, *, limit: int = LIMIT) -> None:
        self._limit = limit
        self._held: list[bytes] = []
        self._size = 0

    def feed(self, data: bytes) -> Sequence[bytes]:
        """Nothing yet: the payload is whole at the end."""
        self._size += len(data)
        if self._size > self._limit:
            detail = f"The provider sent a document of more than {self._limit} bytes."
            raise ProviderError("too_large", detail, retryable=False)
        self._held.append(data)
        return ()

    def end(self) -> list[bytes]:
        """The body, once."""
        held, self._held = self._held, []
        return [b"".join(held)] if held else []
