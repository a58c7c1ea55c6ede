"""LiteLLM's table `LiteLLM_SpendLogs`: a row is a request with its answer, written when that has ended."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from app.conversations.sources.answer import answer
from app.conversations.sources.content import member, micros, moment, name, parsed, role_of, text_of, whole
from app.conversations.sources.parts import IDS, TEXTS, Found, Part
from app.conversations.sources.shape import LONGEST, Key, Message, Row, Session, Skipped, Time, unnamed
from app.conversations.sources.table import quoted
from app.conversations.summary import QUESTION, Said

_INTEGERS = frozenset({"int4", "int8"})
_STAMPS = frozenset({"timestamp", "timestamptz"})
_JSONB = frozenset({"jsonb"})
PARTS: Mapping[str, Part] = {
    "key": Part(("requestid",), IDS),
    "session": Part(("sessionid",), IDS),
    "time": Part(("starttime",), _STAMPS),
    "end": Part(("endtime",), _STAMPS),
    "model": Part(("model",), TEXTS),
    "tokens": Part(("totaltokens",), _INTEGERS),
    "call_type": Part(("calltype",), TEXTS),
    "status": Part(("status",), TEXTS, is_needed=False),
    "end_user": Part(("enduser",), IDS, is_needed=False),
    "username": Part(("user",), IDS, is_needed=False),
    "client_ip": Part(("requesteripaddress",), TEXTS, is_needed=False),
    "messages": Part(("messages",), _JSONB, is_needed=False),
    "request": Part(("proxyserverrequest",), _JSONB, is_needed=False),
    "response": Part(("response",), _JSONB, is_needed=False),
}
# Words in the call types of requests that are no part of a conversation.
_OTHER_CALLS = (
    *("embedding", "moderation", "transcription", "speech", "image", "rerank", "ocr", "vector", "file", "batch"),
    *("fine_tuning", "search", "mcp", "video", "container", "health", "list_"),
)


@dataclass(frozen=True, slots=True)
class LiteLLM:
    """A request and its answer are two messages. The user is the end user, or else the key's."""

    table: str
    key: Key
    time: Time | None
    session: Session | None
    reads: Sequence[str]
    tells: Sequence[str]
    kind: str = "litellm"

    def said(self, row: Row) -> Said | Skipped:
        key, session, began, ended, model, used, call, status, username, client_ip, last = (row[n] for n in range(11))
        if wrong := unnamed(session or "", username or ""):
            return wrong
        if any(word in (call or "") for word in _OTHER_CALLS):
            return Skipped("not_a_message")
        began, ended = moment(began), moment(ended)
        asked = _asked(last)[:QUESTION]
        return Said(
            *(session, username or "", micros(began), key, "user" if asked else "other", ended or began, asked),
            *(name(model), name(client_ip), "", whole(used), _between(began, ended), 1 if status == "failure" else 2),
        )

    def messages(self, row: Row) -> Sequence[Message]:
        began, ended, model, last, response = moment(row[2]), moment(row[3]), name(row[4]), row[10], row[11]
        told = [Message("user", text, began)] if (text := _asked(last)) else []
        of = answer(response)
        if not isinstance(of, Skipped) and of.text:
            told.append(Message("assistant", of.text, ended, model))
        return told


def litellm(found: Found) -> LiteLLM:
    reads = (
        *(found.key_read(), found.text("session"), found.moment("time", zone="UTC"), found.moment("end", zone="UTC")),
        *(found.text("model"), found.number("tokens"), found.text("call_type"), found.text("status")),
        *(_user(found), found.text("client_ip"), _last(found)),
    )
    tells = (*reads, found.json("response"))
    time = found.time(zone="UTC", means="began")
    return LiteLLM(found.table.name, found.key, time, found.session(), reads, tells)


def _user(found: Found) -> str:
    return f"coalesce(nullif({found.text('end_user')}, ''), {found.text('username')})"


def _last(found: Found) -> str:
    """The last message of a request, which holds the whole history; prompts are stored only if LiteLLM is told to."""
    places = [f"{quoted(found.columns['messages'].name)} -> -1"] if "messages" in found.columns else []
    if "request" in found.columns:
        request = quoted(found.columns["request"].name)
        places += [f"{request} -> 'messages' -> -1", f"{request} -> 'input' -> -1", f"{request} -> 'input'"]
    return f"left((coalesce({', '.join(places)}))::text, {LONGEST + 1})" if places else "null::text"


def _asked(last: str | None) -> str:
    """The question, unless the last that was said to the model is something else, like what a tool found."""
    value = parsed(last) if last else None
    is_asked = isinstance(value, str) or role_of(member(value, "role")) == "user"
    return text_of(value if isinstance(value, str) else member(value, "content")) if is_asked else ""


def _between(began: datetime | None, ended: datetime | None) -> int:
    return whole((ended - began) // timedelta(milliseconds=1)) if began and ended else 0
