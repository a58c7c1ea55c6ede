"""What a message sets in motion, worked out without calling anyone: who answers, which flows run, who waits for whom.

Stages follow one another and the steps of a stage run side by side. A stage waits for those earlier steps that
somebody needs: the router, the answer, a step whose failure ends the run, a step whose output is used later. All
others are side flows: nobody waits for them.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from app.flows.conditions import Ask, as_word, holds
from app.flows.config import ANSWER, Chatbot, Condition, Flow, Step
from app.flows.templates import compiled

_OUTPUT = "output."

Place = tuple[str | int, ...]


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
    idle = {chatbot.router.flow} if chatbot.router and decision.final else set[str]()
    steps = [[step for step in stage if step.flow not in idle and holds(step.when, ask)] for stage in chatbot.plan]
    stages = tuple(tuple(stage) for stage in steps if stage)
    needs = _needs(chatbot, stages, _candidates(chatbot, decision))
    router = chatbot.router if chatbot.router and chatbot.router.flow in needs else None
    speculative = router is not None and router.speculative
    if router is not None and speculative:
        needs[ANSWER] = needs[router.flow]
    return Plan(decision, stages, needs, router.flow if router else None, speculative)


def _decide(chatbot: Chatbot, ask: Ask) -> Decision:
    decision = _by_request(chatbot, ask) or _by_rule(chatbot, ask) or _otherwise(chatbot, ask)
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


def _otherwise(chatbot: Chatbot, ask: Ask) -> Decision:
    router = chatbot.router
    if router is None:
        return Decision(chatbot.answers[0], "default", "no rule holds")
    if not any(step.flow == router.flow and holds(step.when, ask) for _, step in _places(chatbot)):
        return Decision(router.default, "default", f"{router.flow} does not run for this message")
    return Decision(router.default, "router", f"until {router.flow} decides", final=False)


def _candidates(chatbot: Chatbot, decision: Decision) -> Collection[str]:
    """The flows that may answer after this decision."""
    router = chatbot.router
    return {decision.flow} if router is None or decision.final else {router.default, *router.outcomes.values()}


def routed(chatbot: Chatbot, output: str | None, *, image: bool = False) -> Decision:
    """What the router's output decides; None where it has none. A picture still goes to a flow that sees it."""
    router = chatbot.router
    assert router is not None
    if output is None:
        return Decision(router.default, "default", f"{router.flow} did not say")
    said = as_word(output)
    for outcome, flow in router.outcomes.items():
        if as_word(outcome) == said:
            if image and not chatbot.flows[flow].images and chatbot.flows[router.default].images:
                return Decision(router.default, "image", f"{flow} cannot see pictures")
            return Decision(flow, "router", f"{router.flow} said {outcome}")
    return Decision(router.default, "default", f"{router.flow} said none of its outcomes")


def heard(chatbot: Chatbot, decision: Decision) -> str:
    """What the router had said, as far as the decision still tells: one of its outcomes, or nothing."""
    router = chatbot.router
    assert router is not None
    said = f"{router.flow} said "
    return decision.reason.removeprefix(said) if decision.by == "router" else ""


# -- who waits for whom


def _needs(
    chatbot: Chatbot, stages: tuple[tuple[Step, ...], ...], answers: Collection[str]
) -> dict[str, frozenset[str]]:
    """`answers` are the flows that may still answer: what only others use delays nobody."""
    needs: dict[str, frozenset[str]] = {}
    awaited: frozenset[str] = frozenset()
    for number, stage in enumerate(stages):
        needs |= dict.fromkeys((step.flow for step in stage), awaited)
        used = _used(chatbot, stages[number + 1 :], answers)
        awaited |= {step.flow for step in stage if _is_awaited(step, chatbot, used)}
    return needs


def _is_awaited(step: Step, chatbot: Chatbot, used: frozenset[str]) -> bool:
    router = chatbot.router is not None and step.flow == chatbot.router.flow
    return router or step.flow == ANSWER or step.on_failure == "fail" or step.flow in used


def _used(chatbot: Chatbot, stages: tuple[tuple[Step, ...], ...], answers: Collection[str]) -> frozenset[str]:
    """The flows whose output some step of these stages uses."""
    return frozenset(name for stage in stages for step in stage for name in _uses(chatbot, step, answers))


def _uses(chatbot: Chatbot, step: Step, answers: Collection[str]) -> Iterator[str]:
    yield from step.when.output
    for name in answers if step.flow == ANSWER else (step.flow,):
        if name in chatbot.flows:  # a mistake of its own otherwise
            yield from _outputs_in(chatbot.flows[name])


def _outputs_in(flow: Flow) -> Iterator[str]:
    for text in (flow.system, flow.prompt):
        for name in compiled(text).names:
            if name.startswith(_OUTPUT):
                yield name.removeprefix(_OUTPUT)


# -- what cannot work


def mistakes(chatbot: Chatbot) -> list[tuple[Place, str]]:
    """Why this configuration cannot work: places in the chatbot's part of the file, and what to do."""
    checks = (_unknown_flows, _bad_plan, _bad_outputs, _bad_words, _bad_speculation)
    return [mistake for check in checks for mistake in check(chatbot)]


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
        chosen: list[tuple[Place, str]] = [(("outcomes", word), name) for word, name in router.outcomes.items()]
        for place, name in [*chosen, (("default",), router.default)]:
            if name not in chatbot.answers:
                yield ("router", *place), f"{name!r} is not one of the answers ({answers})"


def _bad_plan(chatbot: Chatbot) -> Iterator[tuple[Place, str]]:
    stage_of = _stage_of(chatbot)
    answered = stage_of.get(ANSWER, len(chatbot.plan))
    seen: set[str] = set()
    for place, step in _places(chatbot):
        yield from ((place, mistake) for mistake in _bad_step(chatbot, step))
        if step.flow in seen:
            yield place, f"{step.flow!r} is in the plan twice"
        if step.on_failure == "fail" and step.flow != ANSWER and stage_of[step.flow] >= answered:
            yield place, f"only a step of a stage before {ANSWER!r} can make the run fail: leave on_failure out"
        seen.add(step.flow)
    if ANSWER not in seen:
        yield ("plan",), f"one step must be {ANSWER!r}"
    if (router := chatbot.router) and stage_of.get(router.flow, len(chatbot.plan)) >= answered:
        yield ("plan",), f"the router {router.flow!r} must stand in a stage before {ANSWER!r}"


def _bad_step(chatbot: Chatbot, step: Step) -> Iterator[str]:
    if step.flow != ANSWER and step.flow not in chatbot.flows:
        yield f"there is no flow named {step.flow!r}"
    if step.flow in chatbot.answers:
        yield f"{step.flow!r} is one of the answers: write {ANSWER!r} where it shall run"
    if step.flow == ANSWER and step.when != Condition():
        yield "the answer always runs: leave its condition out"


def _stage_of(chatbot: Chatbot) -> dict[str, int]:
    return {step.flow: number for number, stage in enumerate(chatbot.plan) for step in stage}


def _places(chatbot: Chatbot) -> Iterator[tuple[Place, Step]]:
    for number, stage in enumerate(chatbot.plan):
        for index, step in enumerate(stage):
            yield ("plan", number, index), step


def _bad_outputs(chatbot: Chatbot) -> Iterator[tuple[Place, str]]:
    """Outputs may be used by later stages only."""
    stage_of, never = _stage_of(chatbot), len(chatbot.plan)

    def late(used: str, number: str | int) -> str | None:
        if stage_of.get(used, never) < int(number):
            return None
        remedy = f": write {ANSWER!r} for the flow that answers" if used in chatbot.answers else ""
        return f"uses the output of {used!r}, which runs in no earlier stage{remedy}"

    for place, step in _places(chatbot):
        for name in chatbot.answers if step.flow == ANSWER else (step.flow,):
            for used in _outputs_in(chatbot.flows[name]) if name in chatbot.flows else ():
                if wrong := late(used, place[1]):
                    yield ("flows", name), wrong
        for used in step.when.output:
            if wrong := late(used, place[1]):
                yield place, f"its condition {wrong}"


def _bad_words(chatbot: Chatbot) -> Iterator[tuple[Place, str]]:
    """What flows say is compared without case and punctuation, so that a word needs more than those."""
    outcomes = chatbot.router.outcomes if chatbot.router else {}
    heard: dict[str, str] = {}
    words: list[tuple[Place, str]] = []
    for outcome in outcomes:
        words.append((("router", "outcomes", outcome), outcome))
        if (other := heard.setdefault(as_word(outcome), outcome)) != outcome:
            yield words[-1][0], f"is the same as {other!r}: case and punctuation do not count"
    for place, step in _places(chatbot):
        words += [(place, word) for said in step.when.output.values() for word in said]
    for place, word in words:
        if not as_word(word):
            yield place, f"{word!r} is no word that a flow could say"


def _bad_speculation(chatbot: Chatbot) -> Iterator[tuple[Place, str]]:
    router = chatbot.router
    if router is None or not router.speculative:
        return
    needs = _needs(chatbot, chatbot.plan, chatbot.answers)
    if others := needs.get(ANSWER, frozenset()) - needs.get(router.flow, frozenset()) - {router.flow}:
        yield ("router", "speculative"), f"the answer cannot start early: it waits for {', '.join(sorted(others))}"
    default = chatbot.flows.get(router.default)
    if default is not None and router.flow in _outputs_in(default):
        yield ("router", "speculative"), f"{router.default!r} cannot start early: it uses the output of {router.flow!r}"
