"""The conversations in a file of JSON, one by one as its bytes come: no more than one of them is in memory. Pure."""

import re
from collections.abc import Iterator

from app.errors import Invalid

# The largest conversation, in bytes; of an object with a list of them, what stands before that.
LARGEST, _LARGEST_HEAD = 16 << 20, 64 << 10
# Quotes and brackets of a conversation: what has more has more members than a body may have (`parse_object`), each of
# which has four at most.
_MOST_SIGNS = 4 * 500_000 + 2

_OUTSIDE = re.compile(rb'["{}\[\]]')
# Up to what ends a text, or up to a backslash that ends the chunk.
_INSIDE = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
_LIST = re.compile(rb'"chats"\s*:\s*$')
_QUOTE = ord('"')
_OPENING = b"{["
# How far back a list's name is looked for.
_TAIL = 64
_BETWEEN = b" \t\r\n,"


class Elements:
    """Of a list of conversations, of an object with such a list as its `chats`, or of one that is alone.

    `head` is what stands before the list of such an object. What comes behind a list is not looked at.
    """

    def __init__(self) -> None:
        self.count = 0
        self.head = b""
        self._depth = 0
        # How deep in the file the list is; 0 where the file itself may be the one conversation.
        self._list = 0
        self._held = bytearray()
        self._holds = self._in_text = self._escaped = self._is_over = False
        self._first: bytes = b""
        self._seen = self._signs = 0

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """The elements that end in this chunk. Raises Invalid for what cannot be a file of conversations."""
        if not chunk:
            return
        # `start`: where what belongs to the element begins, or what stands between two of them.
        at = start = self._begin(chunk)
        while not self._is_over and (mark := self._next(chunk, at)) is not None:
            at, sign = mark + 1, chunk[mark]
            self._count()
            if sign == _QUOTE:
                self._in_text = not self._in_text
                if not self._holds:
                    raise self._refused("a text stands where a conversation should be")
            elif sign in _OPENING:
                start = self._open(chunk, start, mark)
            elif self._close(chunk[start:mark]):
                yield self._whole(chunk[start:at])
                start = at
        if self._holds:
            self._hold(chunk[start:])
        elif not self._is_over:
            self._require_nothing(chunk[start:])
        self._seen += len(chunk)

    def end(self) -> None:
        """Raises Invalid where the file is not whole."""
        if not self._is_over:
            raise self._refused("the file ends in the middle" if self._first else "the file is empty")

    def _begin(self, chunk: bytes) -> int:
        """Where to look on: behind what opens the file's list."""
        if self._first:
            return 0
        told = chunk.removeprefix(b"\xef\xbb\xbf").lstrip()
        if told.startswith(b"PK"):
            raise self._refused("this is a ZIP archive; unpack it, and send the file of conversations in it")
        if told and told[0] not in _OPENING:
            raise self._refused("this is no JSON with conversations")
        self._first = told[:1]
        at = len(chunk) - len(told)
        if self._first != b"[":
            return at
        self._list = self._depth = 1
        return at + 1

    def _next(self, chunk: bytes, at: int) -> int | None:
        """Where the next sign is that means something here."""
        if self._in_text:
            inside = _INSIDE.match(chunk, at + self._escaped)
            assert inside is not None
            rest = chunk[inside.end() : inside.end() + 1]
            self._escaped = rest == b"\\"
            return inside.end() if rest == b'"' else None
        found = _OUTSIDE.search(chunk, at)
        return None if found is None else found.start()

    def _open(self, chunk: bytes, start: int, mark: int) -> int:
        self._depth += 1
        if self._holds:
            return self._enter(chunk, start, mark) if self._depth == 2 and not self._list else start
        self._require_nothing(chunk[start:mark])
        self._holds = True
        return mark

    def _enter(self, chunk: bytes, start: int, mark: int) -> int:
        """Whether this is where the list of an object begins: what was held so far is not part of a conversation."""
        tail = bytes(self._held[-_TAIL:]) + chunk[max(start, mark - _TAIL) : mark]
        if chunk[mark : mark + 1] != b"[" or not _LIST.search(tail):
            return start
        self.head, self._list, self._holds = bytes(self._held) + chunk[start:mark], 2, False
        self._forget()
        if len(self.head) > _LARGEST_HEAD:
            raise self._refused(f"more than {_LARGEST_HEAD >> 10} KiB stand before the chats")
        return mark + 1

    def _close(self, before: bytes) -> bool:
        """Whether that ends a conversation."""
        if not self._holds:
            self._require_nothing(before)
        self._depth -= 1
        ended = self._holds and self._depth == self._list
        self._is_over = self._depth < max(self._list, 1)
        return ended

    def _whole(self, rest: bytes) -> bytes:
        self._hold(rest)
        whole, self._holds = bytes(self._held), False
        self._forget()
        self.count += 1
        return whole

    def _hold(self, part: bytes) -> None:
        self._held += part
        if len(self._held) > LARGEST:
            raise self._refused(f"a conversation is larger than {LARGEST >> 20} MiB")

    def _count(self) -> None:
        self._signs += 1
        if self._signs > _MOST_SIGNS:
            raise self._refused("a conversation has too many members")

    def _forget(self) -> None:
        self._held.clear()
        self._signs = 0

    def _require_nothing(self, between: bytes) -> None:
        if between.strip(_BETWEEN):
            raise self._refused("something else stands where a conversation should be")

    def _refused(self, why: str) -> Invalid:
        where = f"behind conversation {self.count}" if self.count else "at its beginning"
        return Invalid("import_invalid", f"The file cannot be read {where}, around byte {self._seen}: {why}.")
