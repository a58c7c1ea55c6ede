"""Plans of any chatbot: nothing starts before what it needs, every run ends, one flow answers; and files round-trip."""

from dataclasses import replace
from typing import Any

import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from app.flows.conditions import Ask, outputs_hold
from app.flows.config import (
    ANSWER,
    Allow,
    Assignment,
    Chatbot,
    Choice,
    Condition,
    Flow,
    Router,
    Rule,
    Step,
)
from app.flows.export import to_yaml
from app.flows.file import File, parse, problems
from app.flows.markers import Marker
from app.flows.plan import Plan, mistakes, plan, routed
from app.flows.preview import preview
from app.providers.provider import Endpoint

ANSWERS, SIDES = ("main", "other", "look"), ("a", "b", "c", "d")
WORDS = ("yes", "no", "Maybe.", "返品", "")

words = st.lists(st.sampled_from([word for word in WORDS if word]), min_size=1, max_size=2, unique=True).map(tuple)
OUTPUTS = [f"{{{{output.{name}}}}}" for name in (*SIDES, "answer")]
PIECES = ["{{message}}", "{{history}}", "Say\nso: ", "x: y", *OUTPUTS]
texts = st.lists(st.sampled_from(PIECES), max_size=2).map(" ".join)


@st.composite
def conditions(draw: st.DrawFn, *, outputs: bool = True) -> Condition:
    output = draw(st.dictionaries(st.sampled_from((*SIDES, ANSWER)), words, max_size=1)) if outputs else {}
    return Condition(
        draw(st.sampled_from([None, None, True, False])),
        draw(st.sampled_from([(), (), ("de",), ("en", "fr")])),
        draw(st.sampled_from([(), (), ("refund",), ("返品", "cash back")])),
        output,
    )


@st.composite
def flows(draw: st.DrawFn) -> Flow:
    names = draw(st.lists(st.sampled_from(["p", "q"]), min_size=1, max_size=2, unique=True))
    choices = tuple(Choice(Endpoint(name, "openai", f"http://{name}/v1"), "m", {"seed": 1}) for name in names)
    return Flow(
        choices,
        system=draw(texts),
        prompt=draw(texts) or "{{message}}",
        stream=draw(st.booleans()),
        output=draw(st.sampled_from(["text", "json"])),
        images=draw(st.booleans()),
        history=draw(st.sampled_from([None, 0, 5])),
        timeout_s=draw(st.sampled_from([None, 2.5])),
        on_break=draw(st.sampled_from(["restart", "fail"])),
    )


@st.composite
def bots(draw: st.DrawFn) -> Chatbot:
    answers = tuple(draw(st.lists(st.sampled_from(ANSWERS), min_size=1, max_size=3, unique=True)))
    sides = draw(st.lists(st.sampled_from(SIDES), max_size=4, unique=True))
    router = None
    if sides and draw(st.sampled_from([True, False])):
        outcomes = draw(st.dictionaries(st.sampled_from(["yes", "no"]), st.sampled_from(list(answers)), min_size=1))
        router = Router(sides[0], outcomes, draw(st.sampled_from(answers)), draw(st.booleans()))
    steps = [Step(name, draw(conditions()), draw(st.sampled_from(["continue", "continue", "fail"]))) for name in sides]
    order = draw(st.permutations([*steps, Step(ANSWER)]))
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(order) - 1)), max_size=3)))
    stages = [tuple(order[i:j]) for i, j in zip([0, *cuts], [*cuts, len(order)], strict=True)]
    rules = draw(st.lists(st.builds(Rule, conditions(outputs=False), st.sampled_from(answers)), max_size=2))
    return Chatbot(
        flows={name: draw(flows()) for name in (*answers, *sides)},
        answers=answers,
        plan=tuple(stage for stage in stages if stage),
        rules=tuple(rules),
        router=router,
        markers=draw(st.sampled_from([(), (Marker("card", "[[", "]]"),)])),
        language=draw(st.sampled_from(["", "de"])),
        values=draw(st.dictionaries(st.sampled_from(["who"]), st.sampled_from(["me", "a\nb"]))),
        allow=draw(st.sampled_from([Allow(), Allow((0, 1), (1, 9), ("de",), ("who",), True)])),
        on_busy=draw(st.sampled_from(["enqueue", "reject", "interrupt"])),
    )


def mended(chatbot: Chatbot) -> Chatbot:
    """Without most of what random choice gets wrong, so that few examples are thrown away."""
    stage_of = {step.flow: number for number, stage in enumerate(chatbot.plan) for step in stage}
    for name in chatbot.answers:
        stage_of[name] = stage_of[ANSWER]

    def clean(name: str, text: str) -> str:
        for used in (*SIDES, ANSWER):
            if stage_of.get(used, 9) >= stage_of.get(name, 0):
                text = text.replace(f"{{{{output.{used}}}}}", "")
        return text

    def step(step: Step) -> Step:
        output = {used: said for used, said in step.when.output.items() if stage_of.get(used, 9) < stage_of[step.flow]}
        late = stage_of[step.flow] >= stage_of[ANSWER]
        return replace(step, when=replace(step.when, output=output), on_failure="continue" if late else step.on_failure)

    router = chatbot.router
    return replace(
        chatbot,
        flows={
            name: replace(flow, system=clean(name, flow.system), prompt=clean(name, flow.prompt))
            for name, flow in chatbot.flows.items()
        },
        plan=tuple(tuple(step(one) for one in stage) for stage in chatbot.plan),
        router=router if router and stage_of[router.flow] < stage_of[ANSWER] else None,
    )


asks = st.builds(
    Ask,
    st.sampled_from(["Hello", "a REFUND, now", "お返品ください", "art party", ""]),
    st.booleans(),
    st.sampled_from(["", "de", "en"]),
    st.none(),
)


def performed(chatbot: Chatbot, planned: Plan, data: st.DataObject) -> list[str]:
    """Run a plan as the execution does, every step ending and failing at any moment; the order of the starts."""
    outputs: dict[str, str] = {}
    ended: set[str] = set()
    started: list[str] = []
    running: list[str] = []
    for _ in range(2 * len(planned.steps) + 1):
        for name, step in planned.steps.items():
            if name not in started and planned.needs[name] <= ended:
                started.append(name)
                if outputs_hold(step.when, outputs):
                    running.append(name)
                else:
                    ended.add(name)
        if running:
            name = running.pop(data.draw(st.integers(0, len(running) - 1)))
            output = data.draw(st.sampled_from([*WORDS, None]))
            ended.add(name)
            if output is not None:
                outputs[name] = output
            if name == planned.router:
                assert routed(chatbot, output).flow in chatbot.answers
    assert ended == set(planned.steps), "a step never ended"
    return started


@settings(max_examples=150)
@given(bots(), asks, st.data())
def test_every_run_ends_and_nothing_starts_before_what_it_needs(
    chatbot: Chatbot, ask: Ask, data: st.DataObject
) -> None:
    assume(not mistakes(chatbot))
    planned = plan(chatbot, ask)
    assert planned == plan(chatbot, ask)
    started = performed(chatbot, planned, data)
    assert started.count(ANSWER) == 1
    for name, needs in planned.needs.items():
        assert needs <= set(started[: started.index(name)])


@settings(max_examples=150)
@given(bots(), asks)
def test_one_flow_answers_and_nobody_waits_for_side_flows(bot: Chatbot, ask: Ask) -> None:
    assume(not mistakes(chatbot := mended(bot)))
    planned = plan(chatbot, ask)
    assert planned.decision.flow in chatbot.answers
    assert sum(name in chatbot.answers for stage in planned.shown() for name in stage) == 1
    awaited = frozenset().union(*planned.needs.values())
    used = {
        name
        for flow in chatbot.flows.values()
        for name in (*SIDES, ANSWER)
        if f"output.{name}}}" in flow.system + flow.prompt
    } | {name for stage in chatbot.plan for step in stage for name in step.when.output}
    router = chatbot.router.flow if chatbot.router else None
    for name in awaited - {ANSWER, router}:
        assert name in used or planned.steps[name].on_failure == "fail"
    if ask.image and any(chatbot.flows[name].images for name in chatbot.answers):
        assert chatbot.flows[planned.decision.flow].images or not planned.decision.final


@settings(max_examples=60)
@given(bots(), asks)
def test_a_plan_can_be_put_into_words(bot: Chatbot, ask: Ask) -> None:
    assume(not mistakes(chatbot := mended(bot)))
    told = "\n".join(preview(chatbot, ask))
    for name in chatbot.flows:
        if name not in chatbot.answers:
            assert name in told


@settings(max_examples=60)
@given(bots())
def test_what_uses_an_output_that_is_not_there_yet_is_a_mistake(chatbot: Chatbot) -> None:
    stage_of = {step.flow: number for number, stage in enumerate(chatbot.plan) for step in stage}
    for number, stage in enumerate(chatbot.plan):
        for step in stage:
            if any(stage_of.get(name, number) >= number for name in step.when.output):
                assert mistakes(chatbot)


@settings(max_examples=100)
@given(bots())
def test_an_exported_file_gives_the_same_chatbot(bot: Chatbot) -> None:
    assume(not [*problems(chatbot := mended(bot))])
    again = parse(to_yaml({"shop": chatbot}))
    assert again.chatbots == {"shop": chatbot}


@settings(max_examples=40)
@given(bots())
def test_templates_go_along_where_they_are_the_newest(made: Chatbot) -> None:
    assume(not [*problems(chatbot := mended(made))])
    flow = Flow(chatbot.flows[chatbot.answers[0]].choices, "Old: {{message}}\nyes", Assignment("support", 2))
    bot = Chatbot({**chatbot.flows, chatbot.answers[0]: flow}, chatbot.answers, chatbot.plan, router=chatbot.router)
    assume(not [*problems(bot)])
    alone: File = parse(to_yaml({"shop": bot}, newest={"support": 2}))
    assert alone.templates == {"support": "Old: {{message}}\nyes"}
    assert alone.chatbots["shop"].flows[bot.answers[0]].system == flow.system
    older: dict[str, Any] = yaml.safe_load(to_yaml({"shop": bot}, newest={"support": 3}))
    assert older["chatbots"]["shop"]["flows"][bot.answers[0]]["template"] == "support@2"
    assert "templates" not in older
