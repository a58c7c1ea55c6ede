"""Flowise's table `chat_message`: a row is a message, of a chatflow."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from app.conversations.sources.content import moment, name, question, rank, role_of
from app.conversations.sources.parts import EXTRAS, IDS, TEXTS, TIMES, Found, Part
from app.conversations.sources.shape import LONGEST, Key, Message, Row, Session, Skipped, Time, unnamed
from app.conversations.sources.table import quoted
from app.conversations.summary import QUESTION, Said

PARTS: Mapping[str, Part] = {
    "key": Part(("id",), IDS),
    "role": Part(("role",), TEXTS),
    "content": Part(("content",), TEXTS),
    "chatbot": Part(("chatflowid",), IDS),
    "session": Part(("sessionid",), IDS),
    "chat": Part(("chatid",), IDS),
    "time": Part(("createddate",), TIMES),
    **{part: of for part, of in EXTRAS.items() if part != "chatbot"},
}


@dataclass(frozen=True, slots=True)
class Flowise:
    """The conversation is the session, or the chat where there is none."""

    table: str
    key: Key
    time: Time | None
    session: Session
    reads: Sequence[str]
    tells: Sequence[str]
    kind: str = "flowise"

    def said(self, row: Row) -> Said | Skipped:
        key, session, role_name, text, at, chatbot, username, client_ip = (row[column] for column in range(8))
        if wrong := unnamed(session or "", username or ""):
            return wrong
        role, at = role_of(role_name), moment(at)
        asked = question(text or "") if role == "user" else ""
        return Said(
            *(session, username or "", rank(key, at), str(key), role, at, asked, ""),
            *(name(client_ip), name(chatbot)),
        )

    def messages(self, row: Row) -> Sequence[Message]:
        return (Message(role_of(row[2]), row[3] or "", moment(row[4])),)


def flowise(found: Found) -> Flowise:
    session, chat = (found.columns[part] for part in ("session", "chat"))
    one, other = quoted(session.name), quoted(chat.name)
    is_none = f"nullif({one}::text, '') is null"
    condition = f"({one} = $1::text::{session.type} or {is_none} and {other} = $1::text::{chat.type})"
    # A question's beginning for the index; all of it for a reader.
    reads, tells = (
        (
            *(found.key_read(), f"left(coalesce(nullif({one}::text, ''), {other}::text), 1025)"),
            *(found.text("role"), found.text("content", most), found.moment("time")),
            *(found.text("chatbot"), found.text("username"), found.text("client_ip")),
        )
        for most in (QUESTION, LONGEST)
    )
    is_indexed = session.is_indexed and chat.is_indexed
    return Flowise(
        *(found.table.name, found.key, found.time(), Session(one, session.type, condition, is_indexed)),
        *(reads, tells),
    )
