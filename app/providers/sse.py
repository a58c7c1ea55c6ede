"""Server-sent events in, data payloads out: the WHATWG algorithm without I/O, for bytes split anywhere.

https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation
"""

from collections.abc import Iterator

from app.providers.provider import ProviderError

LIMIT = 1024 * 1024
_BOM = b"\xef\xbb\xbf"


class Decoder:
    """One stream's decoder. Only `data` matters here: vendors repeat the event's type inside it.

    An event that the stream leaves unfinished is dropped, as the standard says. A line, or the data of an event, of
    more than `limit` bytes raises ProviderError("too_large") after the events before it were given out.
    """

    def __init__(self, *, limit: int = LIMIT) -> None:
        self._limit = limit
        self._held: list[bytes] = []  # pieces of a line without its end; joined once, so that tiny pieces stay linear
        self._held_size = 0
        self._data: list[bytes] = []
        self._data_size = 0
        self._at_start = True
        self._after_cr = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The payloads that these bytes complete: the event's data lines joined by newlines, still encoded."""
        if self._at_start:
            data = self._without_bom(data)
        if self._after_cr or b"\r" in data:
            data = self._with_newlines(data)
        *lines, rest = data.split(b"\n")
        if lines and self._held:
            lines[0] = b"".join((*self._held, lines[0]))
            self._held.clear()
            self._held_size = 0
        for line in lines:
            if line:
                self._read(line)
            elif self._data:
                yield self._dispatch()
        if rest:
            self._hold(rest)

    def end(self) -> list[bytes]:
        """The stream is over. There is nothing to add: an event that was left unfinished is none."""
        return []

    def _without_bom(self, data: bytes) -> bytes:
        data = b"".join((*self._held, data))
        self._held.clear()
        self._held_size = 0
        if len(data) < len(_BOM) and _BOM.startswith(data):
            self._held.append(data)
            return b""
        self._at_start = False
        return data.removeprefix(_BOM)

    def _with_newlines(self, data: bytes) -> bytes:
        if self._after_cr and data:
            data = data.removeprefix(b"\n")
            self._after_cr = False
        if data:
            self._after_cr = data.endswith(b"\r")
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")

    def _hold(self, rest: bytes) -> None:
        self._held_size += len(rest)
        if self._held_size > self._limit:
            raise self._too_large()
        self._held.append(rest)

    def _read(self, line: bytes) -> None:
        if len(line) > self._limit:
            raise self._too_large()
        if line.startswith(b"data: "):
            value = line[6:]
        elif line.startswith(b"data:"):
            value = line[5:]
        elif line == b"data":
            value = b""
        else:
            return  # a comment, another field, or a field nobody knows
        self._data_size += len(value) + 1
        if self._data_size > self._limit + 1:
            raise self._too_large()
        self._data.append(value)

    def _dispatch(self) -> bytes:
        payload = self._data[0] if len(self._data) == 1 else b"\n".join(self._data)
        self._data.clear()
        self._data_size = 0
        return payload

    def _too_large(self) -> ProviderError:
        detail = f"The provider sent a line or event of more than {self._limit} bytes."
        return ProviderError("too_large", detail, retryable=False)
