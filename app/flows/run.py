"""One run as data: what is asked for which stream, what came of each flow, and how it ended."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from time import perf_counter
from uuid import UUID, uuid5

from app.chats.chat import Message
from app.chats.usage import Outcome
from app.flows.config import Chatbot
from app.flows.plan import Plan
from app.providers.provider import Image, Usage
from app.streams.event import Status
from app.streams.stream import Stream


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a message brings for the prompts of all its flows. `temperature` and `top_k` win over the flows' own."""

    text: str
    history: Sequence[Message] = ()
    images: Sequence[Image] = ()
    language: str = ""
    values: Mapping[str, str] = field(default_factory=dict)
    temperature: float | None = None
    top_k: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Run:
    """An accepted message on its way; `started` is perf_counter's time of the request."""

    stream: Stream
    chatbot: Chatbot
    plan: Plan
    inputs: Inputs
    request_id: str | None = None
    started: float = field(default_factory=perf_counter)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a flow or a run did not complete, as clients may read it."""

    code: str
    message: str
    retryable: bool = False
    outcome: Outcome = "failed"


class FlowFailed(Exception):
    """A flow that cannot go on, for a reason of ours."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


# Somebody asked for it: an end of its own, and no error.
CANCELLED = Failure("cancelled", "The answer was stopped on request.", outcome="cancelled")
# The log cannot go on with it: a server that lost commits took over, or its next id holds something else.
LOG_LOST = Failure(
    "log_lost", "The database has lost a part of this answer's events; its text was kept.", retryable=True
)

# What a column for tokens holds; providers have told more.
_MOST_TOKENS = 2**31 - 1


@dataclass(slots=True)
class Attempt:
    """One call of a provider for a flow; times in milliseconds."""

    number: int
    provider: str
    model: str
    started_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    began: float = field(default_factory=perf_counter)
    usage: Usage | None = None
    first_token_ms: int | None = None
    duration_ms: int = 0
    outcome: Outcome = "completed"
    error_code: str | None = None

    def end(self, failure: Failure | None) -> None:
        self.duration_ms = ms_since(self.began)
        if failure is not None:
            self.outcome, self.error_code = failure.outcome, failure.code


@dataclass(slots=True)
class Progress:
    """What came of one flow so far. `text` is what a reader sees; times in milliseconds since the request."""

    flow: str
    attempts: list[Attempt] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    markers: list[tuple[str, str, int]] = field(default_factory=list)
    size: int = 0
    length: int = 0
    finish_reason: str | None = None
    first_token_ms: int | None = None
    duration_ms: int = 0
    failure: Failure | None = None
    error_id: str | None = None

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def shown(self) -> bool:
        return bool(self.pieces or self.markers)

    def clear(self) -> None:
        """Forget what was said: another attempt begins from the start."""
        self.pieces.clear()
        self.markers.clear()
        self.size = self.length = 0
        self.finish_reason = None

    def usage_json(self) -> dict[str, int]:
        return usage_json(self.attempts)


@dataclass(frozen=True, slots=True)
class Result:
    """How a run ends: as its answer did. `flows` holds every flow that was started, the answer too."""

    answer: Progress
    flows: Sequence[Progress]
    mode: str = "sequential"

    @property
    def failure(self) -> Failure | None:
        return self.answer.failure

    @property
    def status(self) -> Status:
        return "completed" if self.failure is None else self.failure.outcome

    def usage_json(self) -> dict[str, int]:
        return usage_json([attempt for flow in self.flows for attempt in flow.attempts])


def usage_json(attempts: Sequence[Attempt]) -> dict[str, int]:
    """The tokens of all attempts together: what was paid for, shown or not."""
    counted = [attempt.usage for attempt in attempts if attempt.usage is not None]
    return {
        "prompt_tokens": min(_MOST_TOKENS, sum(usage.prompt_tokens for usage in counted)),
        "completion_tokens": min(_MOST_TOKENS, sum(usage.completion_tokens for usage in counted)),
    }


def answer_id(stream_id: UUID) -> str:
    """The id of the assistant's message: derived, so that saving it again after a takeover is the same message."""
    return str(uuid5(stream_id, "answer"))


def ms_since(started: float) -> int:
    return round((perf_counter() - started) * 1000)
