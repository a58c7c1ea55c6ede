"""Who answers and why, and what a configuration is told that cannot work."""

from typing import Any

import pytest
import yaml

from app.errors import Misconfigured
from app.flows.conditions import Ask, holds, outputs_hold
from app.flows.config import ANSWER, Chatbot, Condition
from app.flows.file import parse
from app.flows.plan import plan, routed

FLOW: dict[str, Any] = {"provider": "p", "model": "m"}


def chatbot(**fields: Any) -> Chatbot:
    flows = dict.fromkeys(("main", "other", "intent", "side"), FLOW)
    flows |= fields.pop("flows", {})
    bot = {"flows": flows, "answers": ["main", "other"], **fields}
    providers = {"p": {"kind": "openai", "base_url": "http://x"}}
    return parse(yaml.safe_dump({"providers": providers, "chatbots": {"bot": bot}})).chatbots["bot"]


ROUTER = {"flow": "intent", "outcomes": {"buy": "main", "not now": "other"}, "default": "main"}


@pytest.mark.parametrize(
    ("keyword", "text", "found"),
    [
        ("art", "modern ART, please", True),
        ("art", "a party", False),
        ("art", "artful", False),
        ("money back", "my money back", True),
        ("c++", "I like C++", True),
        ("返品", "これを返品したい", True),
        ("art", "我喜欢art吗", True),
        ("คืนเงิน", "ขอคืนเงินครับ", True),
        ("refund", "ＲＥＦＵＮＤください", True),
        ("größe", "Welche Gro\u0308\u00dfe?", True),
        ("कर", "करो", False),
        ("कर", "यह कर।", True),
        ("straße", "in der STRASSE", True),
        ("größe", "Welche Größe?", True),
        (".*", "anything", False),
    ],
)
def test_keywords_are_words_and_never_patterns(keyword: str, text: str, found: bool) -> None:
    assert holds(Condition(keywords=(keyword,)), Ask(text)) is found


def test_the_first_rule_wins_and_a_request_wins_over_all() -> None:
    bot = chatbot(
        rules=[
            {"when": {"language": ["de"], "keywords": ["x"]}, "flow": "main"},
            {"when": {"language": ["DE"]}, "flow": "other"},
        ],
        router=ROUTER,
    )
    assert plan(bot, Ask("x", language="de")).decision.reason == "rule 1 holds"
    assert plan(bot, Ask("y", language="de")).decision.flow == "other"
    assert plan(bot, Ask("x", language="de", flow_type="other")).decision.by == "request"
    assert plan(bot, Ask("x")).decision.final is False
    with pytest.raises(KeyError):
        plan(bot, Ask("x", flow_type="side"))


def test_a_picture_goes_to_a_flow_that_sees() -> None:
    bot = chatbot(flows={"other": FLOW | {"images": True}})
    assert plan(bot, Ask("x", image=True)).decision.flow == "other"
    assert plan(bot, Ask("x")).decision.flow == "main"


@pytest.mark.parametrize(
    ("output", "flow"),
    [
        ("buy", "main"),
        (' "Not now." ', "other"),
        ("NOT NOW", "other"),
        ("„not now“", "other"),
        ("«Not now»。", "other"),
        ("stop!", "other"),
        ("perhaps", "main"),
        ("", "main"),
        (None, "main"),
    ],
)
def test_what_a_router_says(output: str | None, flow: str) -> None:
    router = ROUTER | {"outcomes": {"buy": "main", "not now": "other", '"Stop."': "other"}}
    assert routed(chatbot(router=router), output).flow == flow


def test_what_flows_say_is_compared_without_quotes_and_full_stops() -> None:
    when = Condition(output={"side": ("Yes.",)})
    assert outputs_hold(when, {"side": '"YES"'})
    assert not outputs_hold(when, {"side": "yes and no"})
    assert not outputs_hold(when, {})


def test_a_router_sends_no_picture_to_a_flow_that_cannot_see_it() -> None:
    sees = FLOW | {"images": True}
    bot = chatbot(router=ROUTER, flows={"main": sees})
    assert plan(bot, Ask("x", image=True)).decision.final is False
    assert routed(bot, "not now", image=True).flow == "main"
    assert routed(bot, "not now").flow == "other"
    assert routed(chatbot(router=ROUTER), "not now", image=True).flow == "other"
    assert routed(chatbot(router=ROUTER, flows={"main": sees, "other": sees}), "not now", image=True).flow == "other"


def test_where_the_router_does_not_run_the_default_answers_for_good() -> None:
    bot = chatbot(router=ROUTER, plan=[[{"flow": "intent", "when": {"language": ["de"]}}], ["answer"]])
    assert plan(bot, Ask("x", language="de")).router == "intent"
    planned = plan(bot, Ask("x"))
    assert (planned.decision.flow, planned.decision.by, planned.decision.final) == ("main", "default", True)
    assert (planned.router, planned.shown()) == (None, [["main"]])


def test_an_answer_waits_only_for_outputs_that_it_may_use() -> None:
    bot = chatbot(
        flows={"other": FLOW | {"system": "{{output.side}}"}},
        router=ROUTER,
        rules=[{"when": {"keywords": ["other"]}, "flow": "other"}, {"when": {"keywords": ["main"]}, "flow": "main"}],
        plan=[["intent", "side"], ["answer"]],
    )
    assert plan(bot, Ask("x")).needs[ANSWER] == {"intent", "side"}
    assert plan(bot, Ask("other")).needs[ANSWER] == {"side"}
    assert plan(bot, Ask("main")).needs[ANSWER] == frozenset()


def test_punctuation_counts_on_neither_side() -> None:
    router = ROUTER | {"outcomes": {"Buy!": "other", "not now": "main"}}
    assert routed(chatbot(router=router), "buy.").flow == "other"
    assert outputs_hold(Condition(output={"mood": ("Good!",)}), {"mood": '"good"'})
    assert not outputs_hold(Condition(output={"mood": ("Good!",)}), {})


def test_who_waits_for_whom() -> None:
    bot = chatbot(
        flows={"side": FLOW | {"prompt": "{{output.answer}}"}, "first": FLOW, "guard": FLOW},
        router=ROUTER,
        plan=[["intent", "first", {"flow": "guard", "on_failure": "fail"}], ["answer"], ["side"]],
    )
    planned = plan(bot, Ask("x"))
    assert planned.needs[ANSWER] == {"intent", "guard"}
    assert planned.needs["side"] == {"intent", "guard", ANSWER}
    fixed = plan(bot, Ask("x", flow_type="other"))
    assert "intent" not in fixed.needs


def test_a_later_stage_waits_for_the_answer_and_for_no_side_flow() -> None:
    bot = chatbot(flows={"first": FLOW}, plan=[["first"], ["answer"], ["side"]])
    planned = plan(bot, Ask("x"))
    assert planned.needs == {"first": frozenset(), ANSWER: frozenset(), "side": {ANSWER}}


def test_a_speculative_answer_starts_beside_its_router() -> None:
    planned = plan(chatbot(router=ROUTER | {"speculative": True}), Ask("x"))
    assert planned.speculative
    assert planned.needs[ANSWER] == planned.needs["intent"] == frozenset()


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"flows": {"answer": FLOW}}, "line .*flows.answer: no flow may be named answer"),
        ({"answers": ["main", "none"]}, "answers.1: there is no flow named 'none'"),
        ({"rules": [{"when": {}, "flow": "side"}]}, r"rules.0.flow: 'side' is not one of the answers \(main, other\)"),
        ({"router": ROUTER | {"flow": "main"}}, "router.flow: 'main' must be a flow that is not one of the answers"),
        ({"router": ROUTER | {"default": "side"}}, "router.default: 'side' is not one of the answers"),
        ({"router": ROUTER | {"outcomes": {"x": "side"}}}, "router.outcomes.x: 'side' is not one of the answers"),
        ({"router": ROUTER | {"outcomes": {"x": "main", "X.": "other"}}}, "router.outcomes.x: is the same as 'X.'"),
        (
            {"router": ROUTER | {"outcomes": {"...": "main"}}},
            "router.outcomes....: '...' is no word that a flow could say",
        ),
        (
            {"plan": [["side"], ["answer"], [{"flow": "intent", "when": {"output": {"side": ["!"]}}}]]},
            "plan.2.0: '!' is no word",
        ),
        ({"router": ROUTER, "plan": [["intent", "answer"]]}, "plan: the router 'intent' must stand in a stage before"),
        ({"router": ROUTER, "plan": [["answer", "side"]]}, "plan: the router 'intent' must stand in a stage before"),
        ({"router": ROUTER, "plan": [["answer", "intent"]]}, "plan: the router 'intent' must stand in a stage before"),
        ({"plan": [["side"]]}, "plan: one step must be 'answer'"),
        ({"plan": [["answer"], ["answer"]]}, "plan.1.0: 'answer' is in the plan twice"),
        ({"plan": [["main"]]}, "plan.0.0: 'main' is one of the answers: write 'answer'"),
        ({"plan": [["nothing", "answer"]]}, "plan.0.0: there is no flow named 'nothing'"),
        ({"plan": [["answer"], [{"flow": "side", "on_failure": "fail"}]]}, "plan.1.0: only a step of a stage before"),
        ({"plan": [[{"flow": "side", "on_failure": "fail"}, "answer"]]}, "plan.0.0: only a step of a stage before"),
        ({"plan": [[{"flow": "answer", "when": {"image": True}}]]}, "plan.0.0: the answer always runs"),
        ({"flows": {"main": FLOW | {"system": "{{output.side}}"}}}, "flows.main: uses the output of 'side'"),
        (
            {"flows": {"side": FLOW | {"prompt": "{{output.main}}"}}, "plan": [["answer"], ["side"]]},
            "flows.side: uses the output of 'main', which runs in no earlier stage: write 'answer'",
        ),
        (
            {"router": ROUTER | {"speculative": True}, "plan": [["intent"], ["gone"], ["answer"]]},
            "no flow named 'gone'",
        ),
        ({"router": ROUTER | {"speculative": True}, "answers": ["main", "other", "gone"]}, "no flow named 'gone'"),
        (
            {"router": ROUTER | {"speculative": True}, "flows": {"main": FLOW | {"system": "{{output.intent}}"}}},
            "router.speculative: 'main' cannot start early: it uses the output of 'intent'",
        ),
        (
            {"plan": [["answer", {"flow": "side", "when": {"output": {"answer": ["x"]}}}]]},
            "plan.0.1: its condition uses the output of 'answer'",
        ),
        (
            {
                "router": ROUTER | {"speculative": True},
                "plan": [["intent", {"flow": "side", "on_failure": "fail"}], ["answer"]],
            },
            "router.speculative: the answer cannot start early: it waits for side",
        ),
    ],
)
def test_what_cannot_work_is_told_with_its_line(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(Misconfigured, match=told) as error:
        chatbot(**fields)
    assert "line " in error.value.detail
