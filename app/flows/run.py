"""One run as data: what is asked of which provider for which stream, and how it came out."""

from dataclasses import dataclass, field
from time import perf_counter
from uuid import UUID, uuid5

from app.chats.usage import Outcome
from app.flows.config import Flow
from app.providers.provider import Prompt, Usage
from app.streams.event import Status
from app.streams.stream import Stream


@dataclass(frozen=True, slots=True)
class Run:
    """An accepted message on its way; `started` is perf_counter's time of the request."""

    stream: Stream
    flow: Flow
    prompt: Prompt
    request_id: str | None = None
    started: float = field(default_factory=perf_counter)


@dataclass(slots=True)
class Progress:
    """What came of the answer flow so far; times in milliseconds."""

    provider: str
    model: str
    attempt: int = 1
    pieces: list[str] = field(default_factory=list)
    size: int = 0
    usage: Usage | None = None
    finish_reason: str | None = None
    first_token_ms: int | None = None
    duration_ms: int = 0

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def usage_json(self) -> dict[str, int]:
        usage = self.usage or Usage(0, 0)
        return {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens}


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a run did not complete, as clients may read it."""

    code: str
    message: str
    retryable: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """How a run ends: completed without a failure, else failed."""

    progress: Progress
    failure: Failure | None = None

    @property
    def status(self) -> Status:
        return "completed" if self.failure is None else "failed"

    @property
    def outcome(self) -> Outcome:
        return "completed" if self.failure is None else "failed"


def answer_id(stream_id: UUID) -> str:
    """The id of the assistant's message: derived, so that saving it again after a takeover is the same message."""
    return str(uuid5(stream_id, "answer"))
