"""A proxy's log of messages: a row is a question and the provider's answer as it came, in whose JSON the id is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from app.conversations.sources.answer import Answer, answer
from app.conversations.sources.content import moment, name, question, rank
from app.conversations.sources.parts import EXTRAS, IDS, JSONS, KEY, TEXTS, TIMES, Found, Part
from app.conversations.sources.shape import Key, Message, Row, Session, Skipped, Time, unnamed
from app.conversations.summary import Said

PARTS: Mapping[str, Part] = {
    "key": KEY,
    "question": Part(("userquestion", "question"), TEXTS),
    "response": Part(("rawresponse",), JSONS),
    "time": Part(("time", "timestamp", "createdat", "requesttime"), TIMES, is_needed=False),
    "session": Part((), IDS, is_needed=False),
    "model": Part(("model",), TEXTS, is_needed=False),
    **EXTRAS,
}


@dataclass(frozen=True, slots=True)
class Proxy:
    """A question and its answer are two messages. `path`: where the id is in the JSON, if that is configured."""

    table: str
    key: Key
    time: Time | None
    session: Session | None
    reads: Sequence[str]
    path: Sequence[str] = ()
    kind: str = "proxy"

    @property
    def tells(self) -> Sequence[str]:
        return self.reads

    def said(self, row: Row) -> Said | Skipped:
        key, text, raw, at, session, model, username, client_ip, chatbot = (row[column] for column in range(9))
        of = answer(raw, path=self.path)
        if isinstance(of, Skipped):
            if session is None:
                return Skipped("no_conversation") if raw is None else of
            of = Answer()
        conversation_id = session or of.conversation_id
        if wrong := unnamed(conversation_id, username or ""):
            return wrong
        at, asked = moment(at), question(text or "")
        return Said(
            *(conversation_id, username or "", rank(key, at), str(key), "user" if asked else "other", at, asked),
            *(name(model, of.model), name(client_ip), name(chatbot), of.tokens, 0, 2 if of.has_text else 1),
        )

    def messages(self, row: Row) -> Sequence[Message]:
        told, at = [], moment(row[3])
        if row[1]:
            told.append(Message("user", row[1], at))
        of = answer(row[2], path=self.path)
        if not isinstance(of, Skipped) and of.text:
            told.append(Message("assistant", of.text, at, name(row[5], of.model)))
        return told


def proxy(found: Found, *, path: Sequence[str] = ()) -> Proxy:
    reads = (
        *(found.key_read(), found.json("question"), found.json("response"), found.moment("time")),
        *(found.text("session"), found.text("model"), found.text("username"), found.text("client_ip")),
        found.text("chatbot"),
    )
    return Proxy(found.table.name, found.key, found.time(), found.session(), reads, tuple(path))
