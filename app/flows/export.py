"""Chatbots back in the shape of their file, such that applying it changes nothing."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from app.conversations.sources.source import Source
from app.flows.config import Allow, Assignment, Chatbot, Choice, Condition, Flow, Router, Step
from app.providers.provider import Endpoint


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks, and no aliases: a file is for people."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)


def to_yaml(
    chatbots: Mapping[str, Chatbot], *, newest: Mapping[str, int] | None = None, sources: Sequence[Source] = ()
) -> str:
    """The file that says these chatbots and sources; `newest` as in `to_file`."""
    parts = to_file(chatbots, newest=newest)
    return to_text(parts | (sources_to_file(sources) if sources else {}))


def sources_to_file(sources: Sequence[Source]) -> dict[str, Any]:
    return {"sources": {source.id: source.to_file() for source in sources}}


def to_text(parts: Mapping[str, Any]) -> str:
    """A file, or a part of one, as people write it."""
    return yaml.dump(dict(parts), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def to_file(chatbots: Mapping[str, Chatbot], *, newest: Mapping[str, int] | None = None) -> dict[str, Any]:
    """What the file that says these chatbots holds, in JSON's types.

    `newest` are the newest versions of templates: a flow that uses one of them names the template and the file holds
    its text, so that it stands alone. All others are named with their version, and must be stored where it is applied.
    """
    providers: dict[str, dict[str, Any]] = {}
    texts = {
        flow.assignment.template: flow.system
        for chatbot in chatbots.values()
        for flow in chatbot.flows.values()
        if flow.assignment and flow.assignment.version == (newest or {}).get(flow.assignment.template)
    }
    told = {chatbot_id: _dump_chatbot(chatbot, providers, newest or {}) for chatbot_id, chatbot in chatbots.items()}
    return {"providers": providers, **({"templates": texts} if texts else {}), "chatbots": told}


def _dump_chatbot(chatbot: Chatbot, providers: dict[str, dict[str, Any]], newest: Mapping[str, int]) -> dict[str, Any]:
    whole = _plain(chatbot, Chatbot(flows={}, answers=(), plan=()))
    whole["flows"] = {
        name: _dump_flow(flow, providers, newest, streams=name in chatbot.answers)
        for name, flow in chatbot.flows.items()
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


def _dump_flow(
    flow: Flow, providers: dict[str, dict[str, Any]], newest: Mapping[str, int], *, streams: bool
) -> dict[str, Any]:
    first, *others = [_dump_choice(choice, providers) for choice in flow.choices]
    told = first | _plain(flow, Flow(choices=(), stream=streams))
    del told["choices"]
    if others:
        told["fallbacks"] = others
    if flow.assignment:
        told.pop("system", None)
        del told["assignment"]
        told["template"] = _template(flow.assignment, newest)
    return told


def _template(assignment: Assignment, newest: Mapping[str, int]) -> str:
    is_newest = newest.get(assignment.template) == assignment.version
    return assignment.template if is_newest else f"{assignment.template}@{assignment.version}"


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
    return {name: _listed(member) for name, member in members.items() if member != getattr(usual, name)}


def _listed(value: Any) -> Any:
    match value:
        case tuple():
            return [_listed(item) for item in value]
        case dict():
            return {key: _listed(item) for key, item in value.items()}
        case _:
            return value
