"""The chatbots file: YAML in, validated data out, errors that name the line and the remedy.

docs/chatbots.md describes it; docs/examples/everything.yaml shows all of it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from app.conversations.index import OWN
from app.conversations.sources.source import Source
from app.errors import Misconfigured
from app.flows import markers
from app.flows.config import ANSWER, Allow, Assignment, Chatbot, Choice, Condition, Flow, Router, Rule, Step
from app.flows.document import LONGEST_MISTAKE, Document, Place, dotted, faults
from app.flows.markers import Marker
from app.flows.plan import mistakes
from app.flows.shapes import (
    ChatbotShape,
    ChoiceShape,
    ConditionShape,
    FileShape,
    FlowShape,
    SourceShape,
    StepShape,
    told,
)
from app.flows.templates import Template, TemplateError, compiled
from app.providers.provider import Endpoint, is_chatflow
from app.providers.reach import Reach
from app.references import is_reference
from app.safe import NO_SAFE, Safe

FILE_LIMIT = 1 << 20
_MOST_TOLD = 100
_MAIN = "main"

Refused = Callable[[Sequence[tuple[Place, str]]], Misconfigured]


@dataclass(frozen=True, slots=True)
class File:
    """What a file asks for. A flow whose template is not in it has no text yet: it is looked up when applied.

    `refused` makes the error for mistakes that show only then, naming the lines of the file.
    """

    chatbots: dict[str, Chatbot]
    templates: dict[str, str]
    refused: Refused = field(compare=False)
    sources: tuple[Source, ...] = ()


def load(path: Path, *, safe: Safe = NO_SAFE) -> File:
    """The chatbots of a file by id, their keys as they may be stored. Raises Misconfigured naming all mistakes."""
    try:
        if path.stat().st_size > FILE_LIMIT:
            raise Misconfigured("configuration_invalid", f"{path} is larger than 1 MiB.")
        return parse(path.read_text(encoding="utf-8"), str(path), safe=safe)
    except (OSError, UnicodeDecodeError) as error:
        raise Misconfigured("configuration_unreadable", f"{path} cannot be read: {error}") from None


def parse(text: str, source: str = "configuration", *, safe: Safe = NO_SAFE) -> File:
    """As `load`, for a text."""
    document = Document(text, source)
    return _checked(document.value, document.refused, safe)


def parse_one(chatbot_id: str, given: Mapping[str, Any], *, safe: Safe = NO_SAFE) -> File:
    """One chatbot, `{"chatbot": {...}, "providers": {...}, "templates": {...}}` in the file's shapes.

    Raises Misconfigured naming every mistake at once.
    """
    if unknown := sorted(given.keys() - {"chatbot", "providers", "templates"}):
        raise _refused([([], f"there is no member named {name!r}") for name in unknown])
    parts = {name: given[name] for name in ("providers", "templates") if name in given}
    return _checked({**parts, "chatbots": {chatbot_id: given.get("chatbot")}}, _refused, safe)


def require_reachable(file: File, reach: Reach) -> None:
    """Raises Misconfigured for every provider at an address that it may not have.

    What a name or a reference leads to is asked when a connection is made.
    """
    flows = (flow for chatbot in file.chatbots.values() for flow in chatbot.flows.values())
    endpoints = dict.fromkeys(choice.endpoint for flow in flows for choice in flow.choices)
    wrong: list[tuple[Place, str]] = [
        (
            ("providers", endpoint.name, "base_url"),
            "is in a private network, which PARLEY_PROVIDER_NETWORKS lacks",
        )
        for endpoint in endpoints
        if not is_reference(endpoint.base_url) and not reach.allows_url(endpoint.base_url)
    ]
    if wrong:
        raise file.refused(wrong)


def parse_source(source_id: str, given: Mapping[str, Any]) -> Source:
    """One source in the file's shape. Raises Misconfigured naming every mistake at once."""
    return _checked({"sources": {source_id: dict(given)}}, _refused, NO_SAFE).sources[0]


def _refused(mistakes: Sequence[tuple[Place, str]]) -> Misconfigured:
    told = [f"{dotted(place)}: {text}"[:LONGEST_MISTAKE] for place, text in mistakes[:_MOST_TOLD]]
    return Misconfigured(
        "configuration_invalid", f"The configuration is not usable: {'; '.join(told[:20])}", mistakes=told
    )


def _checked(value: Any, refused: Refused, safe: Safe) -> File:
    if wrong := list(faults(value)):
        raise refused(wrong)
    if isinstance(value, dict) and "sources" in value:
        value = {"chatbots": {}, **value}  # a file may be about sources alone
    try:
        shapes = FileShape.model_validate(value, context=safe)
    except ValidationError as error:
        raise refused(told(error)) from None
    wrong = [*_unknown_providers(shapes), *_bad_templates(shapes), *_taken(shapes)]
    broken = _broken(shapes, wrong)
    chatbots = {name: _chatbot(shape, shapes) for name, shape in shapes.chatbots.items() if name not in broken}
    for name, chatbot in chatbots.items():
        wrong += [(("chatbots", name, *place), text) for place, text in problems(chatbot)]
    if wrong:
        raise refused(wrong)
    return File(chatbots, shapes.templates, refused, _sources(shapes))


def _sources(file: FileShape) -> tuple[Source, ...]:
    return tuple(_source(source_id, shape) for source_id, shape in file.sources.items())


def _source(source_id: str, shape: SourceShape) -> Source:
    return Source(source_id, **shape.model_dump() | {"code": shape.code or source_id, "client": shape.client or ""})


def _taken(file: FileShape) -> Iterator[tuple[Place, str]]:
    if OWN in file.sources:
        yield ("sources", OWN), "is the name of our own chats; choose another"


def _broken(file: FileShape, wrong: Sequence[tuple[Place, str]]) -> set[str]:
    """The chatbots whose parts cannot be put together: they are looked at no further."""
    places = {(place[0], place[1]) for place, _ in wrong}
    users = {place[1] for place, flow in _flows(file) if ("templates", _named(flow)) in places}
    return users | {str(name) for part, name in places if part == "chatbots"}


def problems(chatbot: Chatbot) -> Iterator[tuple[Place, str]]:
    """Why a chatbot cannot work, as far as the shapes of the file do not say so already."""
    yield from mistakes(chatbot)
    if wrong := markers.refusal(chatbot.markers):
        yield ("markers",), wrong
    for name in ("temperature", "top_k"):
        bounds = getattr(chatbot.allow, name)
        if bounds is not None and bounds[0] > bounds[1]:
            yield ("allow", name), "the lower bound comes first"
    yield from _doubles(chatbot)
    yield from _unknown_values(chatbot)


def _doubles(chatbot: Chatbot) -> Iterator[tuple[Place, str]]:
    for number, name in enumerate(chatbot.answers):
        if name in chatbot.answers[:number]:
            yield ("answers", number), f"{name!r} is there twice"


def _unknown_values(chatbot: Chatbot) -> Iterator[tuple[Place, str]]:
    known = {f"value.{name}" for name in (*chatbot.values, *chatbot.allow.values)}
    for name, flow in chatbot.flows.items():
        for member in ("system", "prompt"):
            names = compiled(getattr(flow, member)).names
            for unknown in sorted(used for used in names - known if used.startswith("value.")):
                place = "template" if member == "system" and flow.assignment else member
                yield (
                    ("flows", name, place),
                    f"{{{{{unknown}}}}} is neither in the chatbot's values nor in allow.values",
                )


def _unknown_providers(file: FileShape) -> Iterator[tuple[Place, str]]:
    known = ", ".join(file.providers) or "none"
    for place, flow in _flows(file):
        fallbacks = [((*place, "fallbacks", number), choice) for number, choice in enumerate(flow.fallbacks)]
        for where, choice in [(place, flow), *fallbacks]:
            if choice.provider not in file.providers:
                yield (*where, "provider"), f"no provider is named {choice.provider!r} ({known})"
            elif file.providers[choice.provider].kind == "flowise" and not is_chatflow(choice.model):
                yield (*where, "model"), "the model of a flowise provider is a chatflow's id, without slashes"


def _bad_templates(file: FileShape) -> Iterator[tuple[Place, str]]:
    texts: list[tuple[Place, str]] = [(("templates", name), text) for name, text in file.templates.items()]
    for place, flow in _flows(file):
        texts += [((*place, "system"), flow.system), ((*place, "prompt"), flow.prompt)]
    for where, text in texts:
        try:
            Template(text)
        except TemplateError as error:
            yield where, f"line {error.line} of the text: {str(error).partition(': ')[2]}"


def _flows(file: FileShape) -> Iterator[tuple[tuple[str, str, str, str], FlowShape]]:
    for chatbot_id, chatbot in file.chatbots.items():
        for name, flow in chatbot.flows.items():
            yield ("chatbots", chatbot_id, "flows", name), flow


def _named(flow: FlowShape) -> str:
    """The template of a flow, without the version."""
    return (flow.template or "").partition("@")[0]


# -- from the file's shapes to ours


def _chatbot(chatbot: ChatbotShape, file: FileShape) -> Chatbot:
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
        keep_sessions_days=chatbot.keep_sessions_days,
        daily_messages=chatbot.daily_messages,
        daily_tokens=chatbot.daily_tokens,
    )


def _likely_answers(chatbot: ChatbotShape) -> list[str]:
    """The only flow there is, else the one named main, and what rules and router choose from, as far as it is there."""
    if len(chatbot.flows) == 1:
        return list(chatbot.flows)
    chosen = [rule.flow for rule in chatbot.rules]
    if chatbot.router:
        chosen += [chatbot.router.default, *chatbot.router.outcomes.values()]
    return list(dict.fromkeys([_MAIN, *(name for name in chosen if name in chatbot.flows)]))


def _plan(chatbot: ChatbotShape, answers: tuple[str, ...]) -> tuple[tuple[Step, ...], ...]:
    """As the file says, else the router first, and all side flows beside the answer."""
    if chatbot.plan is not None:
        return tuple(tuple(_step(step) for step in stage) for stage in chatbot.plan)
    first = [chatbot.router.flow] if chatbot.router else []
    side = [name for name in chatbot.flows if name not in (*answers, *first)]
    stages = [first, [ANSWER, *side]]
    return tuple(tuple(Step(name) for name in stage) for stage in stages if stage)


def _step(step: str | StepShape) -> Step:
    if isinstance(step, str):
        return Step(step)
    return Step(step.flow, _condition(step.when), step.on_failure)


def _condition(when: ConditionShape) -> Condition:
    output = {name: tuple(words) for name, words in when.output.items()}
    return Condition(when.image, tuple(when.language), tuple(when.keywords), output)


def _flow(flow: FlowShape, file: FileShape, *, streams: bool) -> Flow:
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


def _choice(choice: ChoiceShape, file: FileShape) -> Choice:
    endpoint = Endpoint(name=choice.provider, **file.providers[choice.provider].model_dump())
    return Choice(endpoint, choice.model, choice.parameters)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
