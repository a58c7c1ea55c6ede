"""Many flows in one answer, over real HTTP: who runs, in what order, and what the reader sees of it."""

import asyncio
import json
from itertools import pairwise
from typing import Any

import pytest

from app.flows.execution import Execution
from app.flows.plan import Decision
from app.flows.run import Failure
from tests.flows.events import data_of, kinds, only, text
from tests.house import House, Open, flow
from tests.providers.wire import as_stream, raw_server, written
from tests.sse import Frame

ROUTED: dict[str, Any] = {
    "flows": {"intent": flow("refund"), "main": flow("Hello there."), "refund": flow("Here is your money.")},
    "router": {"flow": "intent", "outcomes": {"refund": "refund", "other": "main"}, "default": "main"},
}


async def messages(home: House, session_id: str) -> list[tuple[str, str, str]]:
    rows = await home.database.fetch(
        "select role, status, content from messages where chat_id = $1 order by position", session_id
    )
    return [tuple(row) for row in rows]


async def attempts(home: House, flow: str) -> list[tuple[int, str, str, str | None]]:
    rows = await home.database.fetch(
        "select attempt, provider, outcome, error_code from usage_ledger where flow = $1 order by attempt", flow
    )
    return [tuple(row) for row in rows]


async def test_a_router_decides_who_answers(house: Open) -> None:
    async with house() as home:
        await home.apply(shop=ROUTED)
        answer, frames = await home.ask("shop")
        assert answer["flow_type"] == "main"
        assert frames[0].data["data"]["plan"] == [["intent"], ["main"]]
        assert only(frames, "flow_selected") == {"flow": "refund", "by": "router", "reason": "intent said refund"}
        assert text(frames) == "Here is your money."
        assert data_of(frames, "token", "intent") == []
        assert only(frames, "message")["flow"] == "refund"
        assert kinds(frames) == [
            "stream_start", "flow_start", "flow_end", "flow_selected", "flow_start", "token", "flow_end", "message",
            "stream_end",
        ]  # fmt: skip
        assert (await messages(home, answer["session_id"]))[1] == ("assistant", "complete", "Here is your money.")


async def test_what_the_router_says_may_be_anything(house: Open) -> None:
    said = {'"Refund".': "refund", "perhaps a refund": "main", "OTHER": "main", "{{message}} [[x]]": "main"}
    async with house() as home:
        for number, (output, chosen) in enumerate(said.items()):
            flows = ROUTED["flows"] | {"intent": flow(output)}
            await home.apply(**{f"shop{number}": ROUTED | {"flows": flows}})
            _, frames = await home.ask(f"shop{number}")
            assert only(frames, "flow_selected")["flow"] == chosen


async def test_a_router_that_fails_leaves_the_default(house: Open) -> None:
    async with house(provider_retries=0) as home:
        await home.apply(shop=ROUTED | {"flows": ROUTED["flows"] | {"intent": {"provider": "gone", "model": "m"}}})
        _, frames = await home.ask("shop")
        assert only(frames, "flow_error")["flow"] == "intent"
        assert only(frames, "flow_selected") == {"flow": "main", "by": "default", "reason": "intent did not say"}
        assert only(frames, "stream_end")["status"] == "completed"


async def test_rules_decide_without_asking(house: Open) -> None:
    async with house() as home:
        await home.apply(shop=ROUTED | {"rules": [{"when": {"keywords": ["money back"]}, "flow": "refund"}]})
        answer, frames = await home.ask("shop", message_text="I want my MONEY BACK!")
        assert answer["flow_type"] == "refund"
        assert frames[0].data["data"]["plan"] == [["refund"]]
        assert data_of(frames, "flow_selected") == []
        assert text(frames) == "Here is your money."


async def test_side_flows_run_beside_the_answer_and_never_delay_it(house: Open) -> None:
    side = {"mood": flow('{"mood": "glad"}', output="json"), "slow": flow("late", wishes={"first_ms": 600})}
    async with house() as home:
        await home.apply(shop={"flows": {"main": flow("Hello."), **side}})
        _, frames = await home.ask("shop")
        assert only(frames, "flow_output", "mood") == {"flow": "mood", "output": {"mood": "glad"}}
        assert only(frames, "flow_output", "slow") == {"flow": "slow", "output": "late"}
        order = [(frame.event, frame.data["data"].get("flow")) for frame in frames]
        assert order.index(("message", "main")) < order.index(("flow_output", "slow"))
        assert frames[-1].event == "stream_end"
        row = await home.database.fetchrow("select mode, attempts, flows from conversation_processing_metrics")
        assert row is not None
        assert (row["mode"], row["attempts"]) == ("parallel", 3)


async def test_flows_of_a_stage_run_at_once_and_their_texts_never_mix(house: Open) -> None:
    words = {name: " ".join(f"{name}{n}" for n in range(20)) for name in ("main", "one", "two")}
    flows = {name: flow(said, stream=True, wishes={"delay_ms": 10}) for name, said in words.items()}
    async with house() as home:
        await home.apply(shop={"flows": flows, "answers": ["main"]})
        answer, frames = await home.ask("shop")
        assert {name: text(frames, name) for name in words} == words
        order = [(frame.event, frame.data["data"].get("flow")) for frame in frames]
        assert max(order.index(("flow_start", name)) for name in words) < order.index(("token", "main"))
        spoken = [name for kind, name in order if kind == "token"]
        changes = sum(before != name for before, name in pairwise(spoken))
        assert changes > 10, "one after the other"
        assert (await messages(home, answer["session_id"]))[1][2] == words["main"]


async def test_u15_a_side_flow_that_fails_leaves_the_answer_complete(house: Open) -> None:
    async with house(provider_retries=0) as home:
        await home.apply(shop={"flows": {"main": flow("Hello."), "side": {"provider": "gone", "model": "m"}}})
        answer, frames = await home.ask("shop")
        error = only(frames, "flow_error")
        assert (error["flow"], error["code"]) == ("side", "upstream_unavailable")
        assert only(frames, "stream_end") == {
            "status": "completed",
            "usage": {"prompt_tokens": 2, "completion_tokens": 1},
        }
        assert (await messages(home, answer["session_id"]))[1] == ("assistant", "complete", "Hello.")
        assert await attempts(home, "side") == [(1, "gone", "failed", "upstream_unavailable")]


async def test_outputs_of_earlier_stages_are_used_by_later_ones(house: Open) -> None:
    flows = {
        "topic": flow("bicycles"),
        "main": flow(system="They ask about {{output.topic}}.", wishes={"echo": "1"}),
        "follow": flow(prompt="Suggest after: {{output.answer}}", wishes={"echo": "1"}),
        "never": flow("no"),
    }
    plan = [["topic"], ["answer"], ["follow", {"flow": "never", "when": {"output": {"topic": ["cars"]}}}]]
    async with house() as home:
        await home.apply(shop={"flows": flows, "plan": plan})
        _, frames = await home.ask("shop", message_text="{{output.topic}} {{message}}")
        assert "They ask about bicycles." in text(frames, "main")
        assert "{{output.topic}} {{message}}" in text(frames, "main")
        assert "They ask about bicycles." in only(frames, "flow_output", "follow")["output"]
        assert data_of(frames, "flow_start", "never") == []


async def test_a_step_that_must_not_fail_ends_the_run(house: Open) -> None:
    flows = {"guard": {"provider": "gone", "model": "m"}, "main": flow("Hello.")}
    plan = [[{"flow": "guard", "on_failure": "fail"}], ["answer"]]
    async with house(provider_retries=0) as home:
        await home.apply(shop={"flows": flows, "plan": plan})
        answer, frames = await home.ask("shop")
        assert kinds(frames) == ["stream_start", "flow_start", "flow_error", "stream_end"]
        assert only(frames, "stream_end")["status"] == "failed"
        assert len(await messages(home, answer["session_id"])) == 1


async def test_the_likely_answer_may_start_early_and_is_heard_only_if_it_is_chosen(house: Open) -> None:
    router = ROUTED["router"] | {"speculative": True}
    async with house() as home:
        for said, shown in (("other", "Hello there."), ("refund", "Here is your money.")):
            flows = ROUTED["flows"] | {"intent": flow(said, wishes={"first_ms": 200})}
            await home.apply(**{said: ROUTED | {"flows": flows, "router": router}})
            _, frames = await home.ask(said)
            assert text(frames) == shown
            assert len(data_of(frames, "flow_selected")) == 1
            starts = [data["flow"] for data in data_of(frames, "flow_start")]
            assert starts == ["intent", "main" if said == "other" else "refund"]
        rows = await home.database.fetch("select flow, outcome from usage_ledger where chatbot_id = 'refund'")
        assert sorted(map(tuple, rows)) == [("intent", "completed"), ("main", "completed"), ("refund", "completed")]


async def test_a_speculation_that_loses_while_it_speaks_is_closed(house: Open) -> None:
    flows = ROUTED["flows"] | {
        "intent": flow("refund", wishes={"first_ms": 100}),
        "main": flow(wishes={"tokens": 5000, "delay_ms": 10, "key": "loser"}),
    }
    async with house() as home:
        await home.apply(shop=ROUTED | {"flows": flows, "router": ROUTED["router"] | {"speculative": True}})
        _, frames = await home.ask("shop")
        assert text(frames) == "Here is your money."
        assert await attempts(home, "main") == [(1, "demo", "cancelled", "dropped")]


async def test_a_step_that_must_not_fail_keeps_a_speculation_from_starting(house: Open) -> None:
    flows = ROUTED["flows"] | {"guard": {"provider": "gone", "model": "m"}}
    plan = [[{"flow": "guard", "on_failure": "fail"}], ["intent"], ["answer"]]
    shop = {"flows": flows, "plan": plan, "router": ROUTED["router"] | {"speculative": True}}
    async with house(provider_retries=0) as home:
        await home.apply(shop=shop)
        _, frames = await home.ask("shop")
        assert kinds(frames) == ["stream_start", "flow_start", "flow_error", "stream_end"]
        told, end = only(frames, "flow_error"), only(frames, "stream_end")["error"]
        assert end == {name: told[name] for name in ("code", "message", "error_id")}


@pytest.mark.parametrize(("turns", "code"), [(1, "run_timeout"), (2, "dropped")])
async def test_what_a_lost_speculation_has_said_is_not_kept_where_the_run_is_stopped_then(
    house: Open, monkeypatch: pytest.MonkeyPatch, turns: int, code: str
) -> None:
    flows = ROUTED["flows"] | {
        "intent": flow("refund", wishes={"first_ms": 200}),
        "main": flow(wishes={"tokens": 5000, "delay_ms": 5}),
    }
    select = Execution._select

    def select_and_stop(execution: Execution, decision: Decision) -> None:
        select(execution, decision)
        stop(execution, turns)

    def stop(execution: Execution, turns: int) -> None:
        """So many turns of the loop later: just before the drop, or just behind it."""
        if turns:
            asyncio.get_running_loop().call_soon(stop, execution, turns - 1)
        else:
            execution.stop(Failure("run_timeout", "It took too long."))

    monkeypatch.setattr(Execution, "_select", select_and_stop)
    async with house() as home:
        await home.apply(shop=ROUTED | {"flows": flows, "router": ROUTED["router"] | {"speculative": True}})
        answer, frames = await home.ask("shop")
        assert kinds(frames) == ["stream_start", "flow_start", "flow_end", "flow_selected", "stream_end"]
        assert only(frames, "stream_end")["error"]["code"] == "run_timeout"
        assert len(await messages(home, answer["session_id"])) == 1
        assert (await home.row("select flow_type from conversation_processing_metrics"))["flow_type"] == "refund"
        assert [attempt[3] for attempt in await attempts(home, "main")] == [code]


@pytest.mark.parametrize(("said", "heard"), [("other", 10_500), ("refund", 0)])
async def test_more_than_may_be_held_back_at_once_is_heard_whole_or_not_at_all(
    house: Open, said: str, heard: int
) -> None:
    flows = ROUTED["flows"] | {
        "intent": flow(said, wishes={"first_ms": 3000}),
        "main": flow(wishes={"tokens": 10_500, "key": "held"}),
    }
    async with house() as home:
        await home.apply(shop=ROUTED | {"flows": flows, "router": ROUTED["router"] | {"speculative": True}})
        _, frames = await asyncio.wait_for(home.ask("shop"), 30)
        assert len(data_of(frames, "token", "main")) == heard
        outcome = ("completed", None) if heard else ("cancelled", "dropped")
        assert await attempts(home, "main") == [(1, "demo", *outcome)]


# -- retry, fallback, restart (G8)


async def test_u2_failed_tries_before_the_first_token_leave_no_trace_but_are_recorded(house: Open) -> None:
    wishes = {"fault": "status", "status": 529, "times": 2, "key": "u2", "retry_after": 0}
    async with house() as home:
        await home.apply(shop={"flows": {"main": flow("Hello.", wishes=wishes)}})
        _, frames = await home.ask("shop")
        assert kinds(frames) == ["stream_start", "flow_start", "token", "flow_end", "message", "stream_end"]
        assert await attempts(home, "main") == [
            (1, "demo", "failed", "upstream_unavailable"),
            (2, "demo", "failed", "upstream_unavailable"),
            (3, "demo", "completed", None),
        ]


async def test_a_fallback_before_the_first_token_is_announced_by_its_start_alone(house: Open) -> None:
    main = {"provider": "gone", "model": "m", "fallbacks": [flow("Hello.")]}
    async with house(provider_retries=0) as home:
        await home.apply(shop={"flows": {"main": main}})
        _, frames = await home.ask("shop")
        assert [data["provider"] for data in data_of(frames, "flow_start")] == ["gone", "demo"]
        assert data_of(frames, "flow_restart") == []
        assert text(frames) == "Hello."


async def test_what_cannot_succeed_goes_to_the_fallback_at_once(house: Open) -> None:
    main = flow(wishes={"fault": "status", "status": 401}) | {"fallbacks": [flow("Hello.")]}
    async with house() as home:
        await home.apply(shop={"flows": {"main": main}})
        _, frames = await home.ask("shop")
        assert text(frames) == "Hello."
        assert len(await attempts(home, "main")) == 2


async def test_a_fallback_that_is_misconfigured_here_is_passed_over(house: Open) -> None:
    keyless = {"kind": "openai", "base_url": "http://127.0.0.1:9/v1", "api_key": "env:PARLEY_TEST_NOT_SET"}
    providers = {"keyless": keyless, "demo": {"kind": "openai"}}
    broken = {"provider": "keyless", "model": "m"}
    async with house(provider_retries=0) as home:
        providers["demo"]["base_url"] = home.demo
        main = flow(wishes={"fault": "status"}) | {"fallbacks": [broken, flow("Hello.")]}
        body = {"providers": providers, "chatbot": {"flows": {"main": main, "side": broken}}}
        assert (await home.client.put("/api/conversation-config/shop", json=body)).status_code == 200
        _, frames = await home.ask("shop")
        assert text(frames, "main") == "Hello."
        codes = [(number, provider, code) for number, provider, _, code in await attempts(home, "main")]
        assert codes == [(1, "demo", "upstream_unavailable"), (2, "keyless", "flow_misconfigured"), (3, "demo", None)]
        assert only(frames, "flow_error")["code"] == "flow_misconfigured"
        assert "PARLEY_TEST" not in str([frame.data for frame in frames])


async def test_g8_a_failure_in_mid_stream_restarts_elsewhere_and_says_so(house: Open) -> None:
    main = flow("One two three four five.", wishes={"fault": "reset", "after": 3, "delay_ms": 5})
    async with house() as home:
        await home.apply(shop={"flows": {"main": main | {"fallbacks": [flow("All of it.")]}}})
        answer, frames = await home.ask("shop")
        assert only(frames, "flow_restart") == {"flow": "main", "attempt": 2, "reason": "upstream_unavailable"}
        assert text(frames) == "All of it."
        assert (await messages(home, answer["session_id"]))[1] == ("assistant", "complete", "All of it.")


async def test_g8_a_chatbot_may_rather_fail_and_keep_what_was_said(house: Open) -> None:
    main = flow("One two three four five.", wishes={"fault": "reset", "after": 3, "delay_ms": 5}, on_break="fail")
    async with house() as home:
        await home.apply(shop={"flows": {"main": main | {"fallbacks": [flow("All of it.")]}}})
        answer, frames = await home.ask("shop")
        assert data_of(frames, "flow_restart") == []
        assert only(frames, "stream_end")["status"] == "failed"
        assert (await messages(home, answer["session_id"]))[1] == ("assistant", "partial", text(frames))


async def test_g8_the_partial_text_is_kept_where_nothing_better_comes(house: Open) -> None:
    main = flow("One two three four five.", wishes={"fault": "reset", "after": 3, "delay_ms": 5})
    async with house(provider_retries=0) as home:
        await home.apply(shop={"flows": {"main": main | {"fallbacks": [{"provider": "gone", "model": "m"}]}}})
        answer, frames = await home.ask("shop")
        assert data_of(frames, "flow_restart") == []
        assert text(frames)
        assert (await messages(home, answer["session_id"]))[1] == ("assistant", "partial", text(frames))


async def test_a_flow_has_a_deadline_of_its_own(house: Open) -> None:
    flows = {"main": flow("Hello."), "side": flow("late", timeout_s=0.2, wishes={"first_ms": 60_000})}
    async with house() as home:
        await home.apply(shop={"flows": flows})
        _, frames = await home.ask("shop")
        assert only(frames, "flow_error", "side")["code"] == "flow_timeout"
        assert only(frames, "stream_end")["status"] == "completed"


async def test_json_that_is_none_is_tried_again_and_then_an_error(house: Open) -> None:
    flows = {
        "main": flow("Hello."),
        "side": flow("Sure! {", output="json"),
        "good": flow("```json\n[1]\n```", output="json"),
    }
    async with house(provider_retries=1) as home:
        await home.apply(shop={"flows": flows})
        _, frames = await home.ask("shop")
        assert only(frames, "flow_error", "side")["code"] == "upstream_protocol"
        assert only(frames, "flow_output")["output"] == [1]
        assert len(await attempts(home, "side")) == 2


def events(text: str, **usage: int) -> bytes:
    """An answer of an OpenAI-compatible provider, byte by byte as it goes over the wire."""
    told: list[dict[str, Any]] = [
        {"choices": [{"index": 0, "delta": {"content": text}}]},
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "usage": usage},
    ]
    return as_stream([b"data: %s\n\n" % json.dumps(event).encode() for event in told])


async def ask_odd(home: House, url: str, flows: dict[str, Any]) -> list[Frame]:
    """The answer of a chatbot that has the provider `odd` there."""
    providers = {"odd": {"kind": "openai", "base_url": url}, "demo": {"kind": "openai", "base_url": home.demo}}
    body = {"providers": providers, "chatbot": {"flows": flows}}
    response = await home.client.put("/api/conversation-config/odd", json=body)
    assert response.status_code == 200, response.text
    _, frames = await asyncio.wait_for(home.ask("odd"), 10)
    return frames


ODD = {"provider": "odd", "model": "m"}


@pytest.mark.parametrize(("depth", "told"), [(252, "flow_output"), (253, "flow_error"), (300, "flow_error")])
async def test_u12_u15_json_too_deep_to_be_told_is_an_error_of_its_flow_alone(
    house: Open, depth: int, told: str
) -> None:
    deep = events("[" * depth + "]" * depth)
    async with raw_server(lambda wire: written(wire, deep)) as url, house(provider_retries=0) as home:
        frames = await ask_odd(home, url, {"main": flow("Hello."), "side": ODD | {"output": "json"}})
        assert only(frames, told)["flow"] == "side"
        assert only(frames, "stream_end")["status"] == "completed"


async def test_token_counts_that_no_column_holds_do_not_keep_an_answer_from_its_end(house: Open) -> None:
    most = 2**31 - 1
    much = events("Hello.", prompt_tokens=most, completion_tokens=most)
    async with raw_server(lambda wire: written(wire, much)) as url, house() as home:
        frames = await ask_odd(home, url, {"main": ODD, "side": ODD})
        assert only(frames, "stream_end")["usage"] == {"prompt_tokens": most, "completion_tokens": most}


# -- markers, and what the model is told


async def test_markers_are_cut_out_and_come_at_their_place(house: Open) -> None:
    said = "Look: [[card:shoe 42]] nice, [[card:hat]][[card:{{message}}]] and [[card: never closed"
    async with house() as home:
        bot = {"flows": {"main": flow(said)}, "markers": {"card": {"open": "[[card:", "close": "]]"}}}
        await home.apply(shop=bot)
        answer, frames = await home.ask("shop")
        assert text(frames) == "Look:  nice,  and [[card: never closed"
        marked = [data["markers"]["card"] for data in data_of(frames, "token") if data["markers"]]
        assert [content for contents in marked for content in contents] == ["shoe 42", "hat", "{{message}}"]
        kept = await home.database.fetchval("select attachments from messages where role = 'assistant'")
        assert '"offset":6' in kept
        assert (await messages(home, answer["session_id"]))[1][2] == text(frames)


async def test_i8_templates_and_markers_in_a_users_text_are_literal(house: Open) -> None:
    async with house() as home:
        bot = {
            "flows": {"main": flow(system="Talk like {{value.who}}.", wishes={"echo": "1"})},
            "values": {"who": "a {{message}} pirate"},
        }
        await home.apply(shop=bot)
        _, frames = await home.ask("shop", message_text="{{value.who}} {{system}} [[card:x]]")
        assert "{{value.who}} {{system}} [[card:x]]" in text(frames)
        assert "Talk like a {{message}} pirate." in text(frames)


async def test_history_is_cut_by_whole_messages_and_the_dropping_is_told(house: Open) -> None:
    async with house() as home:
        main = flow(wishes={"echo": "1"}, system="Be brief.", context_tokens=700, max_tokens=100)
        await home.apply(shop={"flows": {"main": main}})
        history = [{"role": "user" if n % 2 == 0 else "assistant", "content": f"{n}:" + "x" * 400} for n in range(20)]
        _, frames = await home.ask("shop", conversation_history=history)
        start = only(frames, "flow_start")
        assert 10 <= start["history_dropped"] < 20
        assert "Be brief." in text(frames)
        assert "19:" in text(frames)
        assert "0:xx" not in text(frames).replace("10:xx", "")
        _, frames = await home.ask("shop", message_text="y" * 9000)
        assert only(frames, "stream_end")["error"]["code"] == "prompt_too_long"


async def test_an_old_front_end_that_knows_tokens_only_and_polls_gets_the_right_text(house: Open) -> None:
    flows = ROUTED["flows"] | {"mood": flow('{"mood": 1}', output="json"), "next": flow("Ask more?")}
    async with house() as home:
        await home.apply(shop=ROUTED | {"flows": flows})
        answer = (await home.post("shop")).json()
        shown, last, more = "", 0, True
        async with asyncio.timeout(10):
            while more:
                page = (await home.client.get(answer["streaming_url"], params={"after": last})).json()
                shown += "".join(event["data"]["token"] for event in page["events"] if event["event"] == "token")
                last, more = page["last_event_id"], page["has_more"]
        assert shown == "Here is your money."
