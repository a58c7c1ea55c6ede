"""Writing what a file has, a part of it in each transaction, merged like a device's: twice is the same as once."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import time
from types import ModuleType
from typing import Any, TypeVar

from app.chats.chat import title_from
from app.errors import BadRequest, Invalid
from app.postgres import Connection
from app.sync import arrivals
from app.sync.changes import Changes
from app.sync.edits import later
from app.sync.export import NAME, VERSION
from app.sync.imports import chatgpt, open_webui, ours
from app.sync.imports.conversation import Conversation, Said, Unreadable
from app.sync.imports.elements import Elements
from app.sync.merge import LEAST, AddMessage, Chat, Op, PutChat, behind, stamp_at
from app.text import clean, parse_object

# Of a transaction: messages and chats, and characters of texts, attachments and titles, of
# which there may be one message more.
_MOST, _MOST_TEXT = 500, 2 << 20
# Conversations that could not be read, as far as they are named.
_MOST_FAILED = 100
# Looked through at once, in bytes: some 6 ms where there is nothing but brackets.
_SLICE = 4 << 10
# From so many bytes on a conversation is read aside.
_LARGE = 256 << 10
T = TypeVar("T")
_FORMATS: tuple[ModuleType, ...] = (chatgpt, ours, open_webui)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Some of a conversation's messages, in their order, with their stamps; it began `ms` after 1970."""

    of: Conversation
    ms: int
    messages: Sequence[tuple[Said, str]]


@dataclass(slots=True)
class Import:
    """One file into one user's chats. `failed` are conversations that could not be read, `failures` how many."""

    changes: Changes
    user_id: str
    formats: set[str] = field(default_factory=set)
    chats: int = 0
    messages: int = 0
    chats_added: int = 0
    messages_added: int = 0
    left_out: int = 0
    failures: int = 0
    failed: list[Mapping[str, Any]] = field(default_factory=list)
    _waiting: list[_Piece] = field(default_factory=list)
    _lines: int = 0
    _text: int = 0

    async def read(self, body: AsyncIterator[bytes]) -> None:
        """Import what comes. Raises Invalid for what is no file of conversations; what stood before that is there."""
        elements = Elements()
        try:
            async for chunk in body:
                for start in range(0, len(chunk), _SLICE):
                    for element in elements.feed(chunk[start : start + _SLICE]):
                        await self._take(element, elements)
                    await asyncio.sleep(0)  # others' tokens do not wait for all of it
            elements.end()
        except Invalid:
            await self._write()
            raise
        await self._write()

    async def _take(self, element: bytes, elements: Elements) -> None:
        if elements.count == 1:
            _require_version(elements.head)
        number = elements.count
        try:
            given = await _parsed(element)
        except BadRequest as error:
            raise Invalid(
                "import_invalid", f"Conversation {number} of the file cannot be read: {error.detail}"
            ) from None
        known = next((one for one in _FORMATS if one.recognises(given)), None)
        if known is None and not self.chats:
            told = "These are no chats of this server, of ChatGPT (conversations.json) or of Open WebUI."
            raise Invalid("import_unknown", told)
        try:
            if known is None:
                raise Unreadable("it is of none of the formats that are known")
            await self._add(await _aside(known.read, given, large=len(element) > _LARGE))
        except Unreadable as error:
            self._fail(number, given, str(error))

    def _fail(self, number: int, given: Mapping[str, Any], reason: str) -> None:
        self.failures += 1
        title = given.get("title")
        told = {"number": number, "title": title[:100] if isinstance(title, str) else "", "reason": clean(reason)[:300]}
        if len(self.failed) < _MOST_FAILED:
            self.failed.append(told)

    async def _add(self, conversation: Conversation) -> None:
        self.formats.add(conversation.origin)
        self.chats += 1
        self.messages += len(conversation.messages)
        self.left_out += conversation.left_out
        ms = conversation.ms or next((said.ms for said in conversation.messages if said.ms), round(time() * 1000))
        piece: list[tuple[Said, str]] = []
        await self._write_much()
        self._waiting.append(_Piece(conversation, ms, piece))
        self._lines += 1
        self._text += len(conversation.title)
        for said in _stamped(conversation, ms):
            if await self._write_much():
                piece = []
                self._waiting.append(_Piece(conversation, ms, piece))
            piece.append(said)
            self._lines += 1
            self._text += len(said[0].content) + len(said[0].attachments)

    async def _write_much(self) -> bool:
        """Write what waits, where that is enough for a transaction."""
        if enough := self._lines >= _MOST or self._text >= _MOST_TEXT:
            await self._write()
        return enough

    async def _write(self) -> None:
        if self._waiting:
            written = await self.changes.write(self.user_id, self._ops, dated=True)
            self.chats_added += len(written.chats)
            self.messages_added += len(written.messages)
        self._waiting, self._lines, self._text = [], 0, 0

    async def _ops(self, connection: Connection, now_ms: int) -> Sequence[Op]:
        parents = {piece.of.parent_chat_id for piece in self._waiting if piece.of.parent_chat_id}
        names = {piece.of.id for piece in self._waiting} | parents
        there = await arrivals.targets(connection, self.user_id, names)
        ops: list[Op] = []
        for piece in self._waiting:
            name, have = there[piece.of.id]
            if have is None or have.is_deleted:
                parent = piece.of.parent_chat_id
                put = _chat(piece, name, have, now_ms, parent=there[parent][0] if parent else parent)
                there[piece.of.id] = (name, Chat(name, put.title, stamp=put.stamp))
                ops.append(put)
            ops += [_message(said, stamp, name) for said, stamp in piece.messages]
        return await arrivals.apart(connection, self.user_id, ops)


async def _parsed(element: bytes) -> dict[str, Any]:
    return await _aside(parse_object, element, large=len(element) > _LARGE)


async def _aside(work: Callable[[Any], T], given: Any, *, large: bool) -> T:
    """Done in a thread where it takes so long that others would notice."""
    return await asyncio.to_thread(work, given) if large else work(given)


def _require_version(head: bytes) -> None:
    """Raises Invalid where a file of ours is of a later version."""
    if not head:
        return
    try:
        told = parse_object(head + b"[]}")
    except BadRequest as error:
        raise Invalid("import_invalid", f"What stands before the chats cannot be read: {error.detail}") from None
    version = told.get("version")
    if told.get("format") == NAME and not (isinstance(version, int) and version <= VERSION):
        raise Invalid("import_unknown", f"The file is of a later version; this server reads {VERSION}.")


def _stamped(conversation: Conversation, ms: int) -> Iterator[tuple[Said, str]]:
    """Times as stamps that keep the order of the messages, whatever their times say."""
    stamp = LEAST
    for said in conversation.messages:
        ms = said.ms or ms
        stamp = max(stamp_at(ms), behind(stamp))
        yield said, stamp


def _chat(piece: _Piece, name: str, have: Chat | None, now_ms: int, *, parent: str | None) -> PutChat:
    """One that is new, or comes back."""
    of = piece.of
    stamp = stamp_at(min(piece.ms, now_ms)) if have is None else later(have, now_ms)
    title = of.title or title_from(next((said.content for said in of.messages if said.role == "user"), ""))
    return PutChat(name, clean(title), stamp, parent, of.branch_from_message_id)


def _message(said: Said, stamp: str, chat_id: str) -> AddMessage:
    rest = (said.parent_id, said.attachments, said.status)
    return AddMessage(said.id, chat_id, said.role, clean(said.content), stamp, *rest)
