"""The contract of every provider: a prompt goes in, batches of chunks come out, failures are of one type."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypedDict

from app.errors import UpstreamFailed
from app.providers.reach import Reach

Role = Literal["system", "user", "assistant"]
Kind = Literal["openai", "anthropic", "flowise"]
LimitName = Literal["max_completion_tokens", "max_tokens"]
FinishReason = Literal["stop", "length", "content_filter", "tool_calls"]
ErrorKind = Literal["unavailable", "timeout", "rate_limited", "busy", "refused", "rejected", "protocol", "too_large"]


@dataclass(frozen=True, slots=True)
class Image:
    """A picture that was checked and re-encoded; `mime` is image/png, image/jpeg, image/webp or image/gif."""

    mime: str
    data: bytes


@dataclass(frozen=True, slots=True)
class PromptMessage:
    role: Role
    content: str
    images: Sequence[Image] = ()


@dataclass(frozen=True, slots=True)
class Prompt:
    """One call: what is asked of which model.

    `parameters` are passed on in the dialect's own place and win over what Parley would set, but never replace the
    messages, the model or the streaming. `json_output` asks for a JSON object where the dialect can; `top_k` and
    `session_id` (of one chat of one user) are for dialects that retrieve and remember by themselves (Flowise).
    """

    model: str
    messages: Sequence[PromptMessage]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    max_tokens: int | None = None
    json_output: bool = False
    top_k: int | None = None
    session_id: str | None = None


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of the answer: never empty, without U+0000 and lone surrogates."""

    text: str


@dataclass(frozen=True, slots=True)
class Usage:
    """Totals of the call so far: the last one counts."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Finish:
    """The provider said that the answer is whole, and why it stopped. The last chunk but for usage."""

    reason: FinishReason


Chunk = Text | Usage | Finish

# Calls of one provider under way at once, unless a setting says otherwise.
CONCURRENCY = 2000


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a provider is and how to speak to it. `base_url` may be env:NAME; `api_key` is env:NAME, file:PATH or
    encrypted.

    The last two are for the kind openai: whether it is asked for token counts, and what it calls a limit of tokens.
    """

    name: str
    kind: Kind
    base_url: str
    api_key: str | None = None
    include_usage: bool = True
    limit_name: LimitName = "max_completion_tokens"


def is_chatflow(model: str) -> bool:
    """Whether a model can be the id of a chatflow: one segment of a path."""
    return model.isprintable() and model not in ("", ".", "..") and not {"/", "\\"} & set(model)


@dataclass(frozen=True, slots=True)
class Deadlines:
    """The longest silence in each phase, in seconds. A data event breaks the silence, a comment does not."""

    connect_s: float = 5
    first_token_s: float = 60
    gap_s: float = 30


class Options(TypedDict, total=False):
    """What every dialect takes besides a name and a URL, and hands to the client below it, which has the defaults."""

    api_key: str | None
    deadlines: Deadlines
    concurrency: int
    reach: Reach


@dataclass(frozen=True, slots=True)
class Effort:
    """How often a call is tried again. The backoff doubles, with jitter; a longer Retry-After is cut to
    `longest_wait_s`."""

    retries: int = 2
    backoff_s: float = 0.5
    longest_wait_s: float = 10


class ProviderError(UpstreamFailed):
    """A provider failed. `detail` is sanitised: no key, header, URL or raw body of the provider is in it.

    `retryable` says whether the same call may succeed later; `retry_after` (seconds) is what the provider asked for.
    """

    def __init__(self, kind: ErrorKind, detail: str, *, retryable: bool, retry_after: float | None = None) -> None:
        super().__init__(f"upstream_{kind}", detail, retry_after=retry_after)
        self.kind = kind
        self.retryable = retryable


class Provider(Protocol):
    """One configured provider. Safe for any number of concurrent calls."""

    def stream(self, prompt: Prompt) -> AsyncGenerator[Sequence[Chunk], None]:
        """Make one call; yield what each read from the network held, in order, without empty batches.

        Ends normally only after a Finish; anything else raises ProviderError. Whether to try again is the caller's
        business. Closing the generator (or cancelling its consumer) closes the upstream connection at once.
        """
        ...

    @property
    def full(self) -> bool:
        """Whether another call would be refused as `upstream_busy`."""
        ...

    @property
    def idle(self) -> bool:
        """Whether no call is under way."""
        ...

    async def check(self) -> str:
        """One cheap request for `parley doctor`; returns a sentence, raises ProviderError."""
        ...

    async def aclose(self) -> None: ...
