"""A chatbot's configuration as data: complete in itself, so that a stream can pin it by its version."""

from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any, Literal

from pydantic import TypeAdapter

from app.flows.markers import Marker
from app.providers.provider import Endpoint

# In a plan: the flow that answers, whichever it is. No flow may have this name.
ANSWER = "answer"
# What is kept free for the answer where a flow has a budget but no limit of its own, in tokens.
ANSWER_TOKENS = 1024

OnBusy = Literal["enqueue", "reject", "interrupt"]


@dataclass(frozen=True, slots=True)
class Choice:
    """A model that a flow may be asked of. `parameters` are passed on as they are."""

    endpoint: Endpoint
    model: str
    parameters: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Assignment:
    """The template, by name and version, that a flow's system prompt was taken from."""

    template: str
    version: int


@dataclass(frozen=True, slots=True)
class Flow:
    """One kind of call. `choices` are asked in order: the first, then the fallbacks.

    `system` and `prompt` are templates. With `stream` its text comes as tokens, else whole as one `flow_output`.
    `history` is the most messages it sees (None: as many as the server allows), `context_tokens` the model's budget
    for everything it reads and writes. `on_break`: what happens when a provider fails after the first token.
    """

    choices: tuple[Choice, ...]
    system: str = ""
    assignment: Assignment | None = None
    prompt: str = "{{message}}"
    stream: bool = True
    output: Literal["text", "json"] = "text"
    images: bool = False
    history: int | None = None
    context_tokens: int | None = None
    max_tokens: int | None = None
    timeout_s: float | None = None
    top_k: int | None = None
    on_break: Literal["restart", "fail"] = "restart"


@dataclass(frozen=True, slots=True)
class Condition:
    """Holds when everything it names holds; an empty one always does.

    `keywords`: one of them is in the message. `output`: an earlier flow said one of these words, and nothing else.
    """

    image: bool | None = None
    language: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()
    output: dict[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rule:
    """Decides for an answer flow before anything is asked. The first rule whose condition holds wins."""

    when: Condition
    flow: str


@dataclass(frozen=True, slots=True)
class Router:
    """A flow that picks the answer flow where no rule did: its output is one of `outcomes`, or `default` answers.

    `speculative`: the default answer starts beside the router, unseen, and is dropped if the router decides otherwise.
    """

    flow: str
    outcomes: dict[str, str]
    default: str
    speculative: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """A flow, or ANSWER, in a stage. `on_failure`: whether the run goes on without it."""

    flow: str
    when: Condition = Condition()
    on_failure: Literal["continue", "fail"] = "continue"


@dataclass(frozen=True, slots=True)
class Allow:
    """What the `configuration` of a request may set: nothing, unless it says so here."""

    temperature: tuple[float, float] | None = None
    top_k: tuple[int, int] | None = None
    languages: tuple[str, ...] = ()
    values: tuple[str, ...] = ()
    flow_type: bool = False


@dataclass(frozen=True, slots=True)
class Chatbot:
    """`answers` are the flows that can answer, the default first. `values` are extra values for the templates."""

    flows: dict[str, Flow]
    answers: tuple[str, ...]
    plan: tuple[tuple[Step, ...], ...]
    rules: tuple[Rule, ...] = ()
    router: Router | None = None
    markers: tuple[Marker, ...] = ()
    language: str = ""
    values: dict[str, str] = field(default_factory=dict)
    allow: Allow = Allow()
    on_busy: OnBusy = "enqueue"
    cancel_when_abandoned_s: float | None = None
    keep_sessions_days: float | None = None
    daily_messages: int | None = None
    daily_tokens: int | None = None

    @property
    def takes_images(self) -> bool:
        return any(flow.images for flow in self.flows.values())

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Chatbot":
        return _adapter().validate_python(value)


@cache
def _adapter() -> TypeAdapter[Chatbot]:
    return TypeAdapter(Chatbot)
