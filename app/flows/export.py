"""Chatbots back in the shape of their file; what has its usual value is left out."""

from collections.abc import Mapping
from typing import Any

from app.flows.config import Allow, Chatbot, Choice, Condition, Flow, Router, Step
from app.providers.provider import Endpoint


def dump(chatbots: Mapping[str, Chatbot]) -> dict[str, Any]:
    """The chatbots in the file's shape; what has its usual value is left out. Providers go by name."""
    providers: dict[str, dict[str, Any]] = {}
    told = {chatbot_id: _dump_chatbot(chatbot, providers) for chatbot_id, chatbot in chatbots.items()}
    return {"providers": providers, "chatbots": told}


def _dump_chatbot(chatbot: Chatbot, providers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    whole = _plain(chatbot, Chatbot(flows={}, answers=(), plan=()))
    whole["flows"] = {
        name: _dump_flow(flow, providers, streams=name in chatbot.answers) for name, flow in chatbot.flows.items()
    }
    if chatbot.markers:
        whole["markers"] = {marker.name: {"open": marker.open, "close": marker.close} for marker in chatbot.markers}
    if chatbot.router:
        whole["router"] = _plain(chatbot.router, Router("", {}, ""))
    if chatbot.rules:
        whole["rules"] = [{"when": _plain(rule.when, Condition()), "flow": rule.flow} for rule in chatbot.rules]
    if chatbot.allow != Allow():
        whole["allow"] = _plain(chatbot.allow, Allow())
    whole["plan"] = [[_dump_step(step) for step in stage] for stage in chatbot.plan]
    return whole


def _dump_step(step: Step) -> Any:
    if step == Step(step.flow):
        return step.flow
    told = _plain(step, Step(""))
    return told | {"when": _plain(step.when, Condition())} if "when" in told else told


def _dump_flow(flow: Flow, providers: dict[str, dict[str, Any]], *, streams: bool) -> dict[str, Any]:
    first, *others = [_dump_choice(choice, providers) for choice in flow.choices]
    told = first | _plain(flow, Flow(choices=(), stream=streams))
    del told["choices"]
    if others:
        told["fallbacks"] = others
    if flow.assignment:
        told.pop("system", None)
        del told["assignment"]
        told["template"] = f"{flow.assignment.template}@{flow.assignment.version}"
    return told


def _dump_choice(choice: Choice, providers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The provider gets a name of its own where another of that name is different."""
    wanted = _plain(choice.endpoint, Endpoint("", "openai", ""))
    wanted = {"kind": choice.endpoint.kind} | {name: value for name, value in wanted.items() if name != "name"}
    name, number = choice.endpoint.name, 1
    while providers.setdefault(name, wanted) != wanted:
        number += 1
        name = f"{choice.endpoint.name}-{number}"
    told: dict[str, Any] = {"provider": name, "model": choice.model}
    return told | ({"parameters": choice.parameters} if choice.parameters else {})


def _plain(value: Any, usual: Any) -> dict[str, Any]:
    """The members of a dataclass that are not as usual, in JSON's types."""
    members = {name: getattr(value, name) for name in value.__slots__}
    return {
        name: list(member) if isinstance(member, tuple) else member
        for name, member in members.items()
        if member != getattr(usual, name)
    }
