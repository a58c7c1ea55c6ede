"""The chatbots file: YAML in, validated data out, errors that name the line and the remedy.

docs/chatbots.md describes it; docs/examples/everything.yaml shows all of it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from app.errors import Misconfigured
from app.flows import markers
from app.flows.config import ANSWER, Allow, Assignment, Chatbot, Choice, Condition, Flow, OnBusy, Router, Rule, Step
from app.flows.document import Document, Place, dotted
from app.flows.markers import Marker
from app.flows.plan import mistakes
from app.flows.templates import Template, TemplateError
from app.providers.provider import Endpoint, Kind, LimitName

FILE_LIMIT = 1 << 20
_MOST_TOLD = 100
_MAIN = "main"

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
Text = Annotated[str, Field(max_length=64 << 10)]
Words = Annotated[list[Annotated[str, Field(min_length=1, max_length=200)]], Field(max_length=200)]
Model = Annotated[str, Field(min_length=1, max_length=256)]
Count = Annotated[int, Field(ge=1, le=10_000_000)]
Seconds = Annotated[float, Field(gt=0, le=86400, strict=False)]


@dataclass(frozen=True, slots=True)
class File:
    """What a file asks for. A flow whose template is not in it has no text yet: it is looked up when applied."""

    chatbots: dict[str, Chatbot]
    templates: dict[str, str] = field(default_factory=dict)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Provider(_Strict):
    kind: Kind
    base_url: str
    api_key: str | None = None
    include_usage: bool = True
    limit_name: LimitName = "max_completion_tokens"

    @field_validator("base_url")
    @classmethod
    def _url_or_reference(cls, value: str) -> str:
        if not value.startswith(("http://", "https://", "env:")):
            raise ValueError("must be an http(s) URL, or env:NAME to read it from the environment")
        return value

    @field_validator("api_key")
    @classmethod
    def _reference(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("env:", "file:")):
            raise ValueError("must be a reference, env:NAME or file:/path, never the key itself")
        return value


class _Choice(_Strict):
    provider: str
    model: Model
    parameters: dict[str, Any] = {}

    @field_validator("parameters")
    @classmethod
    def _not_ours(cls, value: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted({"model", "messages", "stream", "stream_options"} & value.keys()):
            raise ValueError(f"{', '.join(taken)} cannot be set here: Parley sets them")
        return value


class _Flow(_Choice):
    fallbacks: Annotated[list[_Choice], Field(max_length=10)] = []
    system: Text = ""
    template: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}(@[1-9][0-9]{0,8})?$")] | None = None
    prompt: Text = "{{message}}"
    stream: bool | None = None
    output: Literal["text", "json"] = "text"
    images: bool = False
    history: Annotated[int, Field(ge=0, le=10_000)] | None = None
    context_tokens: Count | None = None
    max_tokens: Count | None = None
    timeout_s: Seconds | None = None
    top_k: Annotated[int, Field(ge=1, le=10_000)] | None = None
    on_break: Literal["restart", "fail"] = "restart"

    @model_validator(mode="after")
    def _one_system(self) -> "_Flow":
        if self.system and self.template:
            raise ValueError("has both system and template: leave one out")
        return self


class _Condition(_Strict):
    image: bool | None = None
    language: Words = []
    keywords: Words = []
    output: Annotated[dict[Name, Words], Field(max_length=20)] = {}


class _Rule(_Strict):
    when: _Condition
    flow: str

    @field_validator("when")
    @classmethod
    def _known_at_once(cls, value: _Condition) -> _Condition:
        if value.output:
            raise ValueError("a rule decides before anything is asked: it cannot look at outputs (use the router)")
        return value


class _Router(_Strict):
    flow: str
    outcomes: Annotated[dict[str, str], Field(min_length=1, max_length=100)]
    default: str
    speculative: bool = False


class _Step(_Strict):
    flow: str
    when: _Condition = _Condition()
    on_failure: Literal["continue", "fail"] = "continue"


class _Delimiters(_Strict):
    open: str
    close: str


class _Allow(_Strict):
    temperature: Annotated[tuple[float, float], Field(strict=False)] | None = None
    top_k: Annotated[tuple[int, int], Field(strict=False)] | None = None
    languages: Words = []
    values: Annotated[list[Name], Field(max_length=100)] = []
    flow_type: bool = False


class _Chatbot(_Strict):
    flows: Annotated[dict[Name, _Flow], Field(min_length=1, max_length=50)]
    answers: Annotated[list[str], Field(min_length=1, max_length=50)] | None = None
    rules: Annotated[list[_Rule], Field(max_length=100)] = []
    router: _Router | None = None
    plan: Annotated[list[list[str | _Step]], Field(max_length=20)] | None = None
    markers: dict[Name, _Delimiters] = {}
    language: Annotated[str, Field(max_length=64)] = ""
    values: dict[Name, Text] = {}
    allow: _Allow = _Allow()
    on_busy: OnBusy = "enqueue"
    cancel_when_abandoned_s: Seconds | None = None


class _File(_Strict):
    providers: dict[Name, _Provider] = {}
    templates: dict[Name, Text] = {}
    chatbots: dict[Name, _Chatbot]


def load(path: Path) -> File:
    """The chatbots of a file by id. Raises Misconfigured naming every mistake at once."""
    try:
        if path.stat().st_size > FILE_LIMIT:
            raise Misconfigured("configuration_invalid", f"{path} is larger than 1 MiB.")
        return parse(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise Misconfigured("configuration_unreadable", f"{path} cannot be read: {error}") from None


def parse(text: str, source: str = "configuration") -> File:
    """As `load`, for a text."""
    document = Document(text, source)
    return _checked(document.value, document.refused)


def parse_one(chatbot_id: str, given: Mapping[str, Any]) -> File:
    """One chatbot, `{"chatbot": {...}, "providers": {...}, "templates": {...}}` in the file's shapes.

    Raises Misconfigured naming every mistake at once.
    """
    if unknown := sorted(given.keys() - {"chatbot", "providers", "templates"}):
        raise _refused([([], f"there is no member named {name!r}") for name in unknown])
    parts = {name: given[name] for name in ("providers", "templates") if name in given}
    return _checked({**parts, "chatbots": {chatbot_id: given.get("chatbot")}}, _refused)


def _refused(mistakes: Sequence[tuple[Place, str]]) -> Misconfigured:
    told = [f"{dotted(place)}: {text}" for place, text in mistakes[:_MOST_TOLD]]
    return Misconfigured(
        "configuration_invalid", f"The configuration is not usable: {'; '.join(told[:20])}", mistakes=told
    )


def _checked(value: Any, refused: Callable[[Sequence[tuple[Place, str]]], Misconfigured]) -> File:
    try:
        file = _File.model_validate(value)
    except ValidationError as error:
        raise refused([(_place(e["loc"]), _said(e["msg"])) for e in error.errors()]) from None
    if wrong := [*_unknown_providers(file), *_bad_templates(file)]:
        raise refused(wrong)
    chatbots = {name: _chatbot(chatbot, file) for name, chatbot in file.chatbots.items()}
    if wrong := [(("chatbots", name, *place), text) for name, bot in chatbots.items() for place, text in problems(bot)]:
        raise refused(wrong)
    return File(chatbots, file.templates)


def problems(chatbot: Chatbot) -> Iterator[tuple[Place, str]]:
    """Why a chatbot cannot work, as far as the shapes of the file do not say so already."""
    yield from mistakes(chatbot)
    if wrong := markers.refusal(chatbot.markers):
        yield ("markers",), wrong
    for name in ("temperature", "top_k"):
        bounds = getattr(chatbot.allow, name)
        if bounds is not None and bounds[0] > bounds[1]:
            yield ("allow", name), "the lower bound comes first"


def _place(loc: Sequence[str | int]) -> Place:
    # pydantic names the branch of a union it tried, and marks keys: neither is in the file.
    return [part for part in loc if part not in ("[key]", "str", "_Step")]


def _said(message: str) -> str:
    return message.removeprefix("Value error, ")


def _unknown_providers(file: _File) -> Iterator[tuple[Place, str]]:
    known = ", ".join(file.providers) or "none"
    for place, flow in _flows(file):
        fallbacks = [((*place, "fallbacks", number), choice) for number, choice in enumerate(flow.fallbacks)]
        for where, choice in [(place, flow), *fallbacks]:
            if choice.provider not in file.providers:
                yield (*where, "provider"), f"no provider is named {choice.provider!r} ({known})"


def _bad_templates(file: _File) -> Iterator[tuple[Place, str]]:
    texts: list[tuple[Place, str]] = [(("templates", name), text) for name, text in file.templates.items()]
    for place, flow in _flows(file):
        texts += [((*place, "system"), flow.system), ((*place, "prompt"), flow.prompt)]
    for where, text in texts:
        try:
            Template(text)
        except TemplateError as error:
            yield where, str(error)


def _flows(file: _File) -> Iterator[tuple[tuple[str, str, str, str], _Flow]]:
    for chatbot_id, chatbot in file.chatbots.items():
        for name, flow in chatbot.flows.items():
            yield ("chatbots", chatbot_id, "flows", name), flow


# -- from the file's shapes to ours


def _chatbot(chatbot: _Chatbot, file: _File) -> Chatbot:
    answers = tuple(chatbot.answers or _likely_answers(chatbot))
    router = Router(**chatbot.router.model_dump()) if chatbot.router else None
    return Chatbot(
        flows={name: _flow(flow, file, streams=name in answers) for name, flow in chatbot.flows.items()},
        answers=answers,
        plan=_plan(chatbot, answers),
        rules=tuple(Rule(_condition(rule.when), rule.flow) for rule in chatbot.rules),
        router=router,
        markers=tuple(Marker(name, marker.open, marker.close) for name, marker in chatbot.markers.items()),
        language=chatbot.language,
        values=chatbot.values,
        allow=Allow(**{name: _tuple(value) for name, value in chatbot.allow.model_dump().items()}),
        on_busy=chatbot.on_busy,
        cancel_when_abandoned_s=chatbot.cancel_when_abandoned_s,
    )


def _likely_answers(chatbot: _Chatbot) -> list[str]:
    """The only flow there is, else the one named main, and what rules and router choose from."""
    if len(chatbot.flows) == 1:
        return list(chatbot.flows)
    chosen = [rule.flow for rule in chatbot.rules]
    if chatbot.router:
        chosen += [chatbot.router.default, *chatbot.router.outcomes.values()]
    return list(dict.fromkeys([_MAIN, *chosen]))


def _plan(chatbot: _Chatbot, answers: tuple[str, ...]) -> tuple[tuple[Step, ...], ...]:
    """As the file says, else the router first, and all side flows beside the answer."""
    if chatbot.plan is not None:
        return tuple(tuple(_step(step) for step in stage) for stage in chatbot.plan)
    first = [chatbot.router.flow] if chatbot.router else []
    side = [name for name in chatbot.flows if name not in (*answers, *first)]
    stages = [first, [ANSWER, *side]]
    return tuple(tuple(Step(name) for name in stage) for stage in stages if stage)


def _step(step: str | _Step) -> Step:
    if isinstance(step, str):
        return Step(step)
    return Step(step.flow, _condition(step.when), step.on_failure)


def _condition(when: _Condition) -> Condition:
    output = {name: tuple(words) for name, words in when.output.items()}
    return Condition(when.image, tuple(when.language), tuple(when.keywords), output)


def _flow(flow: _Flow, file: _File, *, streams: bool) -> Flow:
    template, _, version = (flow.template or "").partition("@")
    return Flow(
        choices=tuple(_choice(choice, file) for choice in (flow, *flow.fallbacks)),
        system=flow.system if not template or version else file.templates.get(template, ""),
        assignment=Assignment(template, int(version or 0)) if template else None,
        prompt=flow.prompt,
        stream=streams if flow.stream is None else flow.stream,
        output=flow.output,
        images=flow.images,
        history=flow.history,
        context_tokens=flow.context_tokens,
        max_tokens=flow.max_tokens,
        timeout_s=flow.timeout_s,
        top_k=flow.top_k,
        on_break=flow.on_break,
    )


def _choice(choice: _Choice, file: _File) -> Choice:
    endpoint = Endpoint(name=choice.provider, **file.providers[choice.provider].model_dump())
    return Choice(endpoint, choice.model, choice.parameters)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
