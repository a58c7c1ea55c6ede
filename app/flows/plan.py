"""What a message sets in motion, worked out without calling anyone: who answers, which flows run, who waits for whom.

Stages follow one another and the steps of a stage run side by side. A stage waits for those earlier steps that
somebody needs: the router, the answer, a step whose failure ends the run, a step whose output is used later. All
others are side flows: nobody waits for them.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from app.flows.config import ANSWER, Chatbot, Condition, Flow, Step
from app.flows.templates import compiled

_OUTPUT = "output."
# Scripts from here on put no spaces between words, so that a keyword may stand anywhere in them.
_NO_SPACES = "\u2e80"

Place = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Ask:
    """What is known of a message before anything was called. `flow_type` is the flow that the request asks for."""

    text: str
    image: bool = False
    language: str = ""
    flow_type: str | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """Who answers, and why. `final` is false while a router may still decide otherwise."""

    flow: str
    by: str
    reason: str
    final: bool = True


@dataclass(frozen=True, slots=True)
class Plan:
    """The steps of one message, in stages; the answer's step is called ANSWER, and `decision` says which flow it is.

    `needs` says for each step which others must have ended before it starts.
    """

    decision: Decision
    stages: tuple[tuple[Step, ...], ...]
    needs: Mapping[str, frozenset[str]]
    router: str | None = None
    speculative: bool = False

    @property
    def steps(self) -> dict[str, Step]:
        return {step.flow: step for stage in self.stages for step in stage}

    def shown(self) -> list[list[str]]:
        """The stages as flow names, the answer under the name of the flow that is to answer."""
        return [[self.decision.flow if step.flow == ANSWER else step.flow for step in stage] for stage in self.stages]


def plan(chatbot: Chatbot, ask: Ask) -> Plan:
    """The plan for a message. Raises KeyError where the request asks for a flow that does not answer."""
    decision = _decide(chatbot, ask)
    idle = {chatbot.router.flow} if chatbot.router and decision.final else set()
    steps = [[step for step in stage if step.flow not in idle and holds(step.when, ask)] for stage in chatbot.plan]
    stages = tuple(tuple(stage) for stage in steps if stage)
    needs = _needs(chatbot, stages)
    router = chatbot.router if chatbot.router and chatbot.router.flow in needs else None
    speculative = router is not None and router.speculative
    if router is not None and speculative:
        needs[ANSWER] = needs[router.flow]
    return Plan(decision, stages, needs, router.flow if router else None, speculative)


def _decide(chatbot: Chatbot, ask: Ask) -> Decision:
    decision = _by_request(chatbot, ask) or _by_rule(chatbot, ask) or _otherwise(chatbot)
    if ask.image and not chatbot.flows[decision.flow].images:
        for name in chatbot.answers:
            if chatbot.flows[name].images:
                return Decision(name, "image", f"{decision.flow} cannot see pictures")
    return decision


def _by_request(chatbot: Chatbot, ask: Ask) -> Decision | None:
    if ask.flow_type is None:
        return None
    if ask.flow_type not in chatbot.answers:
        raise KeyError(ask.flow_type)
    return Decision(ask.flow_type, "request", "the request asked for it")


def _by_rule(chatbot: Chatbot, ask: Ask) -> Decision | None:
    for number, rule in enumerate(chatbot.rules, 1):
        if holds(rule.when, ask):
            return Decision(rule.flow, "rule", f"rule {number} holds")
    return None


def _otherwise(chatbot: Chatbot) -> Decision:
    if chatbot.router:
        return Decision(chatbot.router.default, "router", f"until {chatbot.router.flow} decides", final=False)
    return Decision(chatbot.answers[0], "default", "no rule holds")


def routed(chatbot: Chatbot, output: str | None) -> Decision:
    """What the router's output decides; None where it failed."""
    router = chatbot.router
    assert router is not None
    if output is None:
        return Decision(router.default, "default", f"{router.flow} failed")
    said = word(output)
    for outcome, flow in router.outcomes.items():
        if word(outcome) == said:
            return Decision(flow, "router", f"{router.flow} said {outcome}")
    return Decision(router.default, "default", f"{router.flow} said none of its outcomes")


def word(output: str) -> str:
    """What a model said, without the quotes and full stops that models like to put around a word."""
    return output.strip("\"'`.,:;!*()[]{}<> \t\r\n").casefold()


# -- conditions


def holds(when: Condition, ask: Ask) -> bool:
    """Whether the part of a condition holds that is known from the message alone."""
    if when.image is not None and when.image != ask.image:
        return False
    if when.language and ask.language.casefold() not in {name.casefold() for name in when.language}:
        return False
    return not when.keywords or _keywords(when.keywords).search(ask.text.casefold()) is not None


def outputs_hold(when: Condition, outputs: Mapping[str, str]) -> bool:
    """Whether the other part holds: what earlier flows have said. A flow that did not run said nothing."""
    return all(word(outputs.get(flow, "")) in {word(said) for said in words} for flow, words in when.output.items())


@lru_cache(maxsize=512)
def _keywords(keywords: tuple[str, ...]) -> re.Pattern[str]:
    """Fixed words only, so that the search is linear; whole words where the script has any."""
    return re.compile("|".join(_whole(word.casefold()) for word in keywords))


def _whole(word: str) -> str:
    before = r"(?<!\w)" if word[0].isalnum() and word[0] < _NO_SPACES else ""
    after = r"(?!\w)" if word[-1].isalnum() and word[-1] < _NO_SPACES else ""
    return before + re.escape(word) + after


# -- who waits for whom


def _needs(chatbot: Chatbot, stages: tuple[tuple[Step, ...], ...]) -> dict[str, frozenset[str]]:
    needs: dict[str, frozenset[str]] = {}
    awaited: frozenset[str] = frozenset()
    for number, stage in enumerate(stages):
        needs |= dict.fromkeys((step.flow for step in stage), awaited)
        used = _used(chatbot, stages[number + 1 :])
        awaited |= {step.flow for step in stage if _is_awaited(step, chatbot, used)}
    return needs


def _is_awaited(step: Step, chatbot: Chatbot, used: frozenset[str]) -> bool:
    router = chatbot.router is not None and step.flow == chatbot.router.flow
    return router or step.flow == ANSWER or step.on_failure == "fail" or step.flow in used


def _used(chatbot: Chatbot, stages: tuple[tuple[Step, ...], ...]) -> frozenset[str]:
    """The flows whose output some step of these stages uses."""
    return frozenset(name for stage in stages for step in stage for name in _uses(chatbot, step))


def _uses(chatbot: Chatbot, step: Step) -> Iterator[str]:
    yield from step.when.output
    for name in chatbot.answers if step.flow == ANSWER else (step.flow,):
        yield from _outputs_in(chatbot.flows[name])


def _outputs_in(flow: Flow) -> Iterator[str]:
    for text in (flow.system, flow.prompt):
        for name in compiled(text).names:
            if name.startswith(_OUTPUT):
                yield name.removeprefix(_OUTPUT)


# -- what cannot work


def mistakes(chatbot: Chatbot) -> list[tuple[Place, str]]:
    """Why this configuration cannot work: places in the chatbot's part of the file, and what to do."""
    return [*_unknown_flows(chatbot), *_bad_plan(chatbot), *_bad_outputs(chatbot), *_bad_speculation(chatbot)]


def _unknown_flows(chatbot: Chatbot) -> Iterator[tuple[Place, str]]:
    answers = ", ".join(chatbot.answers) or "none"
    if ANSWER in chatbot.flows:
        yield ("flows", ANSWER), f"no flow may be named {ANSWER}: in a plan the word stands for the flow that answers"
    for number, name in enumerate(chatbot.answers):
        if name not in chatbot.flows:
            yield ("answers", number), f"there is no flow named {name!r}"
    for number, rule in enumerate(chatbot.rules):
        if rule.flow not in chatbot.answers:
            yield ("rules", number, "flow"), f"{rule.flow!r} is not one of the answers ({answers})"
    if router := chatbot.router:
        if router.flow not in chatbot.flows or router.flow in chatbot.answers:
            yield ("router", "flow"), f"{router.flow!r} must be a flow that is not one of the answers"
        outcomes = [(("outcomes", outcome), name) for outcome, name in router.outcomes.items()]
        for place, name in [*outcomes, (("default",), router.default)]:
            if name not in chatbot.answers:
                yield ("router", *place), f"{name!r} is not one of the answers ({answers})"


def _bad_plan(chatbot: Chatbot) -> Iterator[tuple[Place, str]]:
    seen: list[str] = []
    for place, step in _places(chatbot):
        if step.flow != ANSWER and step.flow not in chatbot.flows:
            yield place, f"there is no flow named {step.flow!r}"
        if step.flow in chatbot.answers:
            yield place, f"{step.flow!r} is one of the answers: write {ANSWER!r} where it shall run"
        if step.flow in seen:
            yield place, f"{step.flow!r} is in the plan twice"
        if step.on_failure == "fail" and ANSWER in seen:
            yield place, "a step behind the answer cannot make the run fail: leave on_failure out"
        if step.flow == ANSWER and step.when != Condition():
            yield place, "the answer always runs: leave its condition out"
        seen.append(step.flow)
    if ANSWER not in seen:
        yield ("plan",), f"one step must be {ANSWER!r}"
    if (router := chatbot.router) and router.flow not in seen[: seen.index(ANSWER) if ANSWER in seen else None]:
        yield ("plan",), f"the router {router.flow!r} must stand in a stage before {ANSWER!r}"


def _places(chatbot: Chatbot) -> Iterator[tuple[Place, Step]]:
    for number, stage in enumerate(chatbot.plan):
        for index, step in enumerate(stage):
            yield ("plan", number, index), step


def _bad_outputs(chatbot: Chatbot) -> Iterator[tuple[Place, str]]:
    """Outputs may be used by later stages only."""
    stage_of = {step.flow: int(place[1]) for place, step in _places(chatbot)}
    for place, step in _places(chatbot):
        for name in chatbot.answers if step.flow == ANSWER else (step.flow,):
            for used in _outputs_in(chatbot.flows[name]) if name in chatbot.flows else ():
                if stage_of.get(used, len(chatbot.plan)) >= int(place[1]):
                    yield ("flows", name), f"uses the output of {used!r}, which runs in no earlier stage"
        for used in step.when.output:
            if stage_of.get(used, len(chatbot.plan)) >= int(place[1]):
                yield place, f"its condition uses the output of {used!r}, which runs in no earlier stage"


def _bad_speculation(chatbot: Chatbot) -> Iterator[tuple[Place, str]]:
    router = chatbot.router
    if router is None or not router.speculative:
        return
    needs = _needs(chatbot, chatbot.plan)
    if others := needs.get(ANSWER, frozenset()) - needs.get(router.flow, frozenset()) - {router.flow}:
        yield ("router", "speculative"), f"the answer cannot start early: it waits for {', '.join(sorted(others))}"
