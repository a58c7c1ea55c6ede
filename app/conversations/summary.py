"""What the rows of a conversation add up to, in whatever order and groups they are read: a commutative merge."""

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from typing import Literal, NamedTuple

Role = Literal["user", "assistant", "other"]
# A rank and a text; where ranks are equal the text decides, so that it does not matter who came first.
Ranked = tuple[int, str]

# As much of a question as the index shows and searches, in characters.
QUESTION = 300
# Keys of the newest messages that are kept per conversation, for sources that cannot find them by their session.
KEYS = 200


class Said(NamedTuple):
    """One row of a source, as it is understood. A tuple, because ten million of them are made in a rebuild.

    `rank` orders the messages of a source and fits a bigint. `key` finds the row again. Tokens and durations are not
    negative. `messages`: how many a row holds, where a question and its answer are one.
    """

    conversation_id: str
    username: str
    rank: int
    key: str
    role: Role
    at: datetime | None = None
    question: str = ""
    model: str = ""
    client_ip: str = ""
    chatbot_id: str = ""
    tokens: int = 0
    duration_ms: int = 0
    messages: int = 1


@dataclass(slots=True)
class Figures:
    """What a day's rows of one chatbot and model add up to."""

    messages: int = 0
    questions: int = 0
    tokens: int = 0
    duration_ms: int = 0

    def add(self, messages: int, questions: int, tokens: int, duration_ms: int) -> None:
        self.messages += messages
        self.questions += questions
        self.tokens += tokens
        self.duration_ms += duration_ms


# In UTC; None for rows without a time. With chatbot and model.
Day = tuple[date | None, str, str]


@dataclass(slots=True)
class Summary:
    """Of one (username, conversation_id). Each row must be added once; that is the only mistake left to avoid.

    Bounded but for `days`, which has one entry per day, chatbot and model. `most_keys` is 0 where nobody needs `keys`.
    """

    most_keys: int = KEYS
    messages: int = 0
    tokens: int = 0
    first_at: datetime | None = None
    last_at: datetime | None = None
    first_question: Ranked | None = None
    last_question: Ranked | None = None
    model: Ranked | None = None
    client_ip: Ranked | None = None
    chatbot_id: Ranked | None = None
    # Of the greatest ranks, in their order.
    keys: list[Ranked] = field(default_factory=list)
    days: dict[Day, Figures] = field(default_factory=dict)

    def add(self, said: Said) -> None:
        self.messages += said.messages
        self.tokens += said.tokens
        if said.at is not None:
            self._at(said.at, said.at)
        if said.role == "user" and said.question:
            asked = (said.rank, said.question[:QUESTION])
            self._asked(asked, asked)
        if said.model:
            self.model = _greatest(self.model, (said.rank, said.model))
        if said.client_ip:
            self.client_ip = _greatest(self.client_ip, (said.rank, said.client_ip))
        if said.chatbot_id:
            self.chatbot_id = _greatest(self.chatbot_id, (said.rank, said.chatbot_id))
        self._key((said.rank, said.key))
        day = (said.at.astimezone(UTC).date() if said.at else None, said.chatbot_id, said.model)
        self._figures(day).add(said.messages, said.role == "user", said.tokens, said.duration_ms)

    def merge(self, other: "Summary") -> None:
        self.messages += other.messages
        self.tokens += other.tokens
        if other.first_at is not None and other.last_at is not None:
            self._at(other.first_at, other.last_at)
        if other.first_question is not None and other.last_question is not None:
            self._asked(other.first_question, other.last_question)
        self.model = _greatest(self.model, other.model)
        self.client_ip = _greatest(self.client_ip, other.client_ip)
        self.chatbot_id = _greatest(self.chatbot_id, other.chatbot_id)
        for key in other.keys:
            self._key(key)
        for day, more in other.days.items():
            self._figures(day).add(more.messages, more.questions, more.tokens, more.duration_ms)

    def _at(self, first: datetime, last: datetime) -> None:
        if self.first_at is None or first < self.first_at:
            self.first_at = first
        if self.last_at is None or last > self.last_at:
            self.last_at = last

    def _asked(self, first: Ranked, last: Ranked) -> None:
        if self.first_question is None or first < self.first_question:
            self.first_question = first
        if self.last_question is None or last > self.last_question:
            self.last_question = last

    def _key(self, key: Ranked) -> None:
        if self.most_keys == 0:
            return
        if len(self.keys) < self.most_keys or key > self.keys[0]:
            insort(self.keys, key)
            del self.keys[: -self.most_keys]

    def _figures(self, day: Day) -> Figures:
        if (found := self.days.get(day)) is None:
            found = self.days[day] = Figures()
        return found


def _greatest(one: Ranked | None, other: Ranked | None) -> Ranked | None:
    if one is None or other is None:
        return one or other
    return max(one, other)


# By username and conversation id.
Summaries = dict[tuple[str, str], Summary]


def fold(rows: Iterable[Said], *, into: Summaries | None = None, most_keys: int = KEYS) -> Summaries:
    """The conversations that rows belong to, added to those that are there."""
    found: Summaries = {} if into is None else into
    for said in rows:
        name = (said.username, said.conversation_id)
        if (summary := found.get(name)) is None:
            summary = found[name] = Summary(most_keys)
        summary.add(said)
    return found
