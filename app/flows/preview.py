"""What a message would set in motion, in words, without calling anyone: `parley plan`."""

from collections.abc import Iterator

from app.errors import Misconfigured
from app.flows.conditions import Ask
from app.flows.config import ANSWER, Chatbot, Condition, Step
from app.flows.plan import Plan, plan


def preview(chatbot: Chatbot, ask: Ask) -> Iterator[str]:
    """Lines for an operator. Raises Misconfigured for a flow that cannot answer."""
    try:
        planned = plan(chatbot, ask)
    except KeyError:
        answers = ", ".join(chatbot.answers)
        raise Misconfigured("flow_missing", f"No flow named {ask.flow_type!r} answers ({answers}).") from None
    decision = planned.decision
    yield f"Answer: {decision.flow}, because {decision.reason}." if decision.final else _open_question(chatbot, planned)
    for number, stage in enumerate(planned.stages, 1):
        yield f"Stage {number}"
        for step in stage:
            yield f"  {_name(step, planned)}{_models(step, chatbot, planned)}"
            yield from (f"      {note}" for note in _notes(step, planned))
    if left_out := [step.flow for stage in chatbot.plan for step in stage if step.flow not in planned.needs]:
        yield f"Not needed for this message: {', '.join(left_out)}."


def _open_question(chatbot: Chatbot, planned: Plan) -> str:
    router = chatbot.router
    assert router is not None
    outcomes = ", ".join(f"{outcome} -> {flow}" for outcome, flow in router.outcomes.items())
    return f"Answer: {router.flow} decides ({outcomes}; anything else -> {router.default})."


def _name(step: Step, planned: Plan) -> str:
    if step.flow != ANSWER:
        return step.flow
    return f"{ANSWER}: {planned.decision.flow}" + (
        "" if planned.router is None else " unless the router decides otherwise"
    )


def _models(step: Step, chatbot: Chatbot, planned: Plan) -> str:
    flow = chatbot.flows[planned.decision.flow if step.flow == ANSWER else step.flow]
    return " [" + ", then ".join(f"{choice.endpoint.name} {choice.model}" for choice in flow.choices) + "]"


def _notes(step: Step, planned: Plan) -> Iterator[str]:
    if needs := planned.needs[step.flow]:
        yield f"waits for {', '.join(sorted(needs))}"
    if step.flow == ANSWER and planned.speculative:
        yield f"starts beside {planned.router}, unheard until it is chosen"
    if step.flow != ANSWER and not any(step.flow in needs for needs in planned.needs.values()):
        yield "nobody waits for it"
    if step.on_failure == "fail":
        yield "the run fails if it does"
    if step.when != Condition() and step.when.output:
        wanted = "; ".join(f"{flow} says {' or '.join(words)}" for flow, words in step.when.output.items())
        yield f"only if {wanted}"
