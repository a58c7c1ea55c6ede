"""LangChain's tables: of its JavaScript (n8n's, too), of its Python, and of langchain-postgres.

JavaScript stores a message flat, `{type, content, …}`, Python nested, `{type, data: {content, …}}`. A row says itself
which it is, so a table that both have written to is no trouble.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from app.conversations.sources.content import member, moment, name, parsed, question, rank, role_of, text_of, tokens
from app.conversations.sources.parts import EXTRAS, IDS, JSONS, KEY, TIMES, Found, Part
from app.conversations.sources.shape import Key, Message, Row, Session, Skipped, Time, unnamed
from app.conversations.summary import Role, Said

PARTS: Mapping[str, Part] = {
    "key": KEY,
    "session": Part(("sessionid",), IDS),
    "message": Part(("message",), JSONS),
    "time": Part(("createdat", "timestamp"), TIMES, is_needed=False),
    **EXTRAS,
}


@dataclass(frozen=True, slots=True)
class LangChain:
    """A row is a message."""

    kind: str
    table: str
    key: Key
    time: Time | None
    session: Session | None
    reads: Sequence[str]

    @property
    def tells(self) -> Sequence[str]:
        return self.reads

    def said(self, row: Row) -> Said | Skipped:
        key, session, text, at, username, client_ip, chatbot = row[0], row[1], row[2], row[3], row[4], row[5], row[6]
        if wrong := unnamed(session or "", username or ""):
            return wrong
        of, at = _message(text), moment(at)
        if isinstance(of, Skipped):
            return of
        role = _role(of)
        asked = question(of.get("content")) if role == "user" else ""
        model, used = _cost(of) if role == "assistant" else ("", 0)
        about = (asked, model, name(client_ip), name(chatbot), used)
        return Said(session, username or "", rank(key, at), str(key), role, at, *about)

    def messages(self, row: Row) -> Sequence[Message]:
        of = _message(row[2])
        if isinstance(of, Skipped):
            return ()
        return (Message(_role(of), text_of(of.get("content")), moment(row[3]), _cost(of)[0]),)


def langchain(kind: str, found: Found) -> LangChain:
    reads = (
        *(found.key_read(), found.text("session"), found.json("message"), found.moment("time")),
        *(found.text("username"), found.text("client_ip"), found.text("chatbot")),
    )
    return LangChain(kind, found.table.name, found.key, found.time(), found.session(), reads)


def named(shape: LangChain, messages: Sequence[str | None]) -> LangChain:
    """The same, called after who wrote its newest messages."""
    is_nested = [isinstance(member(parsed(message), "data"), dict) for message in messages]
    if messages and not any(is_nested):
        return replace(shape, kind="n8n")
    is_dated = shape.time is not None and shape.session is not None and shape.session.type == "uuid"
    return replace(shape, kind="langchain-postgres" if is_dated else "langchain")


def _message(text: str | None) -> dict[str, Any] | Skipped:
    """The message with its type and content in one place."""
    value = parsed(text)
    if isinstance(value, Skipped):
        return value
    if not isinstance(value, dict) or not isinstance(kind := value.get("type"), str):
        return Skipped("not_a_message")
    data = value.get("data")
    of = {**data, "type": kind} if isinstance(data, dict) and "content" not in value else value
    return of if "content" in of else Skipped("not_a_message")


def _role(message: Mapping[str, Any]) -> Role:
    kind = message["type"]
    # A message of a role of one's own.
    return role_of(message.get("role") if kind in ("chat", "generic", "ChatMessageChunk") else kind)


def _cost(message: Mapping[str, Any]) -> tuple[str, int]:
    """Its model and tokens: providers say it in words of their own."""
    used, about = tokens(message.get("usage_metadata")), message.get("response_metadata")
    if not (about and isinstance(about, dict)):
        return "", used
    for usage in (about.get("tokenUsage"), about.get("token_usage"), about.get("usage"), about):
        used = used or tokens(usage)
    return name(about.get("model_name"), about.get("model")), used
